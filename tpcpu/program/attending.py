"""Records of attention: keys and values into the cache, queries rotated, and what heads see of the cache.

Knows how many threads may divide a head's cache, and the memory that they need for it; see `kernels.attention`.
"""

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import activations, attention, attention_pieces, kv_cache
from tpcpu.kernels import record as R
from tpcpu.program.memory import Buffers, CacheMemory, Records
from tpcpu.program.operations import PIECE, Attention, RopeAndStore
from tpcpu.program.products import Products
from tpcpu.program.rope import Rope, tables
from tpcpu.program.weights import float_bits

FEW_TOKENS = 8
"""Up to so many tokens attention divides a head's cache over threads too."""


class Attentions:
    """Writes the records of attention for batches of at most `tokens`."""

    def __init__(
        self, products: Products, buffers: Buffers, records: Records, cache: CacheMemory, *, threads: int, tokens: int
    ) -> None:
        self._products, self._buffers, self._records, self._cache = products, buffers, records, cache
        self._threads, self._tokens = threads, tokens
        self._rooms: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._rope_tables: dict[Rope, NDArray[np.float32]] = {}

    def add(self, rotation: RopeAndStore, op: Attention) -> None:
        """Of one token keys and values are stored, and queries rotated, by whoever attends over them."""
        shared, value_dim = rotation.v is None, op.value_dim or op.head_dim
        v_heads = rotation.v or rotation.k
        q, k, v = (self._buffers[heads.buffer] for heads in (rotation.q, rotation.k, v_heads))
        rotated, out = self._buffers.new(rotation.out), self._buffers.new(op.out)
        cosines, sines = self._rope_table(rotation.rope)
        form, shape = self._cache.kv.form, (op.heads, op.head_dim, value_dim)
        pieces = -(-self._cache.max_positions // PIECE)
        scratch = attention_pieces.scratch_bytes(op.head_dim, value_dim, op.heads)
        # What is kept to be joined later is bounded by few tokens, whatever the chunk.
        if shape not in self._rooms:
            rows = min(FEW_TOKENS, self._tokens) * op.heads * pieces
            self._rooms[shape] = (
                self._buffers.take(rows * attention_pieces.part_bytes(value_dim)),
                self._buffers.take(scratch * self._threads),
            )
        parts, room = self._rooms[shape]
        groups = -(-op.heads // self._together(op)) if shared else rotation.k.count
        words = {
            R.A_Q: q.address, R.A_Q_STRIDE: q.stride,
            R.A_Q_FIRST: 4 * rotation.q.first, R.A_Q_STEP: 4 * rotation.q.step,
            R.A_K: k.address, R.A_K_STRIDE: k.stride,
            R.A_K_FIRST: 4 * rotation.k.first, R.A_K_STEP: 4 * rotation.k.step,
            R.A_V: v.address, R.A_V_STRIDE: v.stride,
            R.A_V_FIRST: 4 * v_heads.first, R.A_V_STEP: 4 * v_heads.step,
            R.A_Q_HEADS: op.heads, R.A_KV_HEADS: groups, R.A_DIM: op.head_dim, R.A_VALUE_DIM: value_dim,
            R.A_ROTATED: rotated.address, R.A_ROTATED_STRIDE: rotated.stride,
            R.A_COS: cosines, R.A_SIN: sines,
            R.A_KEYS: self._cache.keys[op.layer], R.A_VALUES: self._cache.values[op.layer],
            R.A_PAGE_BYTES: self._cache.page_bytes[op.layer],
            R.A_OUT: out.own, R.A_OUT_STRIDE: out.stride, R.A_GROUPS: self._groups(op, groups, shared),
            R.A_SCALE: float_bits(op.scale), R.A_PARTS: parts, R.A_PART_TOKENS: pieces,
            R.A_SCRATCH: room, R.A_SCRATCH_STRIDE: scratch, R.A_WINDOW: op.window,
            R.A_TURNED: rotation.rope.dim, R.A_INTERLEAVED: int(rotation.rope.interleaved),
            R.A_Q_NORM: self._products.vector(rotation.q_norm) if rotation.q_norm else 0,
            R.A_K_NORM: self._products.vector(rotation.k_norm) if rotation.k_norm else 0,
            R.A_EPS: float_bits(rotation.eps), R.A_CAP: float_bits(op.cap), R.A_SLOPES: self._slopes(op),
            R.A_SINKS: self._products.vector(op.sinks) if op.sinks else 0,
        }  # fmt: skip
        if rotation.q_turned and rotation.k_turned:
            q, k = self._buffers[rotation.q_turned.buffer], self._buffers[rotation.k_turned.buffer]
            words |= {
                R.A_Q_TURNED: q.address + 4 * rotation.q_turned.first, R.A_Q_TURNED_STRIDE: q.stride,
                R.A_Q_TURNED_STEP: 4 * rotation.q_turned.step,
                R.A_K_TURNED: k.address + 4 * rotation.k_turned.first, R.A_K_TURNED_STRIDE: k.stride,
            }  # fmt: skip
            self._records.add(kv_cache.store_latent(form), words)
            self._records.wait()
        else:
            several = kv_cache.rope_and_store(form)
            self._records.add([activations.nothing, several, several], words)
        kinds = (attention.attend_one, attention.attend_few, attention.attend_many)
        attend = [kind(form, shared) for kind in kinds]
        self._records.add(attend, words)
        self._records.wait()
        self._records.add([attention.join_pieces, attention.join_pieces, activations.nothing], words)

    def _rope_table(self, rope: Rope) -> tuple[int, int]:
        """Addresses of the cosines and of the sines."""
        if rope not in self._rope_tables:
            self._rope_tables[rope] = np.stack(tables(rope, np.arange(self._cache.max_positions)))
        cosines, sines = self._rope_tables[rope]
        return cosines.ctypes.data, sines.ctypes.data

    def _slopes(self, op: Attention) -> int:
        """The slopes of the heads behind a row of whole numbers, see `record.A_SLOPES`; 0 where there are none."""
        if not op.slopes:
            return 0
        slopes = np.concatenate([np.arange(PIECE), op.slopes]).astype(np.float32)
        self._products.keep.append(slopes)
        return slopes.ctypes.data

    def _together(self, op: Attention) -> int:
        """How many query heads are a group where all read one key: fewer where there would be less of them than
        threads, which share a short text by groups alone. More are faster; who is in one changes no bits."""
        return next((many for many in (8, 4) if many * self._threads <= op.heads), 2)

    def _groups(self, op: Attention, count: int, shared: bool) -> int:
        """Query heads by the key/value head that they read, or in `count` parts of those that all read one; see
        `record.A_GROUPS`."""
        together = self._together(op)
        group_of = [head // together for head in range(op.heads)] if shared else op.kv_of
        order = sorted(range(op.heads), key=lambda head: group_of[head])
        starts = [sum(group < number for group in group_of) for number in range(count + 1)]
        groups = np.array([*starts, *order], np.int32)
        self._products.keep.append(groups)
        return groups.ctypes.data
