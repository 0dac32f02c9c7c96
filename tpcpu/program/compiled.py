"""The fast reader of a program: records for kernels, walked by a team of threads in one compiled call.

Binds a program to memory once; afterwards a step writes a dozen words and enters compiled code. Nothing is allocated
and no Python runs between operations.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.formats.tables import NF4_CODE
from tpcpu.kernels import activations, attention, exchange
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.kernels.isa import selected
from tpcpu.parallel.communicator import AllReduce as AllReduceCall
from tpcpu.parallel.team import Team, aligned
from tpcpu.program.batch import Batch
from tpcpu.program.lowering import Stage, stages
from tpcpu.program.memory import Buffers, CacheMemory, Place, Records, last_uses, stride_bytes
from tpcpu.program.operations import (
    BLOCK,
    PIECE,
    Add,
    AllReduce,
    Attention,
    Buffer,
    Embed,
    Glu,
    Kind,
    Linear,
    Logits,
    Operation,
    Program,
    RmsNorm,
    Rope,
    RopeAndStore,
    Segment,
    ShortConv,
    Weight,
    inputs,
)
from tpcpu.program.weights import PANEL_ROWS, Packed, Table, Vector, float_bits

if selected().panel_rows == 1:
    from tpcpu.kernels.linear_plain import linear
else:
    from tpcpu.kernels.linear import linear

Weights = Mapping[tuple[str, Kind], Packed | Table | Vector]

FEW_TOKENS = 8
"""Up to so many tokens attention divides a head's cache over threads too."""


class Compiled:
    """A program bound to weights, a cache and a team.

    `tokens` is the largest batch and `wanted` the most logits of one. In `exact` arithmetic activations stay float32.
    `all_reduce` says how parts are joined; it is not used by a world of one rank.
    """

    def __init__(
        self, program: Program, weights: Weights, cache: CacheMemory, team: Team, *,
        all_reduce: AllReduceCall | None = None, exact: bool = False, tokens: int, wanted: int,
        join: bool = True, report: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.program = program
        self.tokens, self.wanted = tokens, wanted
        self._weights, self._cache, self._team = weights, cache, team
        self._all_reduce, self._exact = all_reduce, exact
        self._keep: list[object] = [weights, cache]
        self._step = aligned(R.STEP_WORDS)
        self._step[R.TEAM] = team.address
        self._records = Records(self._step.ctypes.data)
        self._rounded: dict[int, tuple[_Rounded, str]] = {}
        self._rooms: dict[tuple[int, int], int] = {}
        self._rope_tables: dict[Rope, NDArray[np.float32]] = {}
        self._tables = _tables()
        alone = program.share.size == 1
        aliases = {op.out.name: op.x.name for op in program.operations if isinstance(op, AllReduce)} if alone else {}
        integer = {id(op) for op in program.operations if self._is_integer(op)}
        planned = stages(program, integer, join=join)
        used = [[buffer for op in stage.operations for buffer in inputs(op)] for stage in planned]
        self._buffers = Buffers(tokens, last_uses(used, aliases))
        largest = max((op.head_dim for op in program.operations if isinstance(op, Attention)), default=0)
        self._scores = self._buffers.take(attention.scratch_bytes(largest) * team.threads)
        for number, stage in enumerate(planned):
            self._lower(stage)
            self._buffers.release(number)
        prepare(self._records.kernels, report)
        self._array = self._records.array()
        self._walk = (self._array.ctypes.data, len(self._array))
        self.logits = self._logits_view()

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Runs the batch; gives (wanted, local vocabulary) float32, valid until the next run."""
        step = self._step
        count = len(batch.tokens)
        assert 0 < count <= self.tokens, count
        assert len(batch.wanted) <= self.wanted
        step[R.TOKENS], step[R.WANTED] = count, len(batch.wanted)
        step[R.CLASS] = 0 if count == 1 else 1 if count <= FEW_TOKENS else 2
        step[R.TOKEN_IDS] = batch.tokens.ctypes.data
        step[R.POSITIONS] = batch.positions.ctypes.data
        step[R.SEQUENCES] = batch.sequences.ctypes.data
        step[R.FIRSTS] = batch.firsts.ctypes.data
        step[R.WANTED_IDS] = batch.wanted.ctypes.data
        step[R.STATES] = batch.states.ctypes.data
        step[R.PAGES] = batch.pages.ctypes.data
        step[R.PAGES_STRIDE] = 4 * batch.pages.shape[1]
        step[R.PAGE_TOKENS] = self._cache.page_tokens
        step[R.RUN] = self._team.number(len(self._array))
        step[R.PIECES] = int(batch.positions.max()) // PIECE + 1
        self._team.walk(*self._walk)
        return self.logits[: len(batch.wanted)]

    # Lowering, operation by operation

    def _lower(self, stage: Stage) -> None:
        match stage.operations:
            case (Add() as add, RmsNorm() as norm):
                self._norm(norm, add, stage.rounded)
            case (RmsNorm() as norm,):
                self._norm(norm, None, stage.rounded)
            case (Embed() as op,):
                self._embed(op)
            case (Add() as op,):
                out = self._buffers.new(op.out)
                words = {**self._sum_inputs(op), R.TOTAL: out.address, R.TOTAL_STRIDE: out.stride}
                self._records.add(activations.add, words)
            case (Linear() as op,):
                self._linear(op.x, op.segments)
            case (ShortConv() as op,):
                self._short_conv(op)
            case (RopeAndStore() as op,):
                self._rope_and_store(op)
            case (Attention() as op,):
                self._attention(op)
            case (Glu() as op,):
                x, y, out = self._buffers[op.activated], self._buffers[op.linear], self._buffers.new(op.out)
                words = {**_between(x, out, len(op.out.own)), R.OUT: out.own}
                self._records.add(activations.glu, {**words, R.SECOND: y.address, R.SECOND_STRIDE: y.stride})
            case (AllReduce() as op,):
                self._exchange(op)
            case (Logits() as op,):
                self._head(op)
            case _:
                raise AssertionError(stage)

    def _embed(self, op: Embed) -> None:
        table = self._weights[op.weight.name, op.weight.kind]
        assert isinstance(table, Table)
        rows = table.rows
        out = self._buffers.new(op.out)
        words = {R.IN: rows.ctypes.data, R.IN_STRIDE: rows.strides[0], R.ELEMENT: table.form}
        self._records.add(
            activations.embed, {**words, R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: op.out.width}
        )

    def _sum_inputs(self, op: Add) -> dict[int, int]:
        x, y = self._buffers[op.x], self._buffers[op.y]
        return {
            R.IN: x.address, R.IN_STRIDE: x.stride, R.SECOND: y.address, R.SECOND_STRIDE: y.stride,
            R.BIAS: self._vector(op.bias) if op.bias else 0, R.WIDTH: op.out.width,
        }  # fmt: skip

    def _norm(self, op: RmsNorm, add: Add | None, rounded: bool) -> None:
        words: dict[int, int] = {}
        if add is None:
            x = self._buffers[op.x]
            words.update({R.IN: x.address, R.IN_STRIDE: x.stride})
        else:
            words.update(self._sum_inputs(add))
            total = self._buffers.new(add.out)
            words.update({R.TOTAL: total.address, R.TOTAL_STRIDE: total.stride})
        out = self._buffers.new(op.out)
        words.update({R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: op.out.width})
        words.update({R.WEIGHT: self._vector(op.weight), R.EPS: float_bits(op.eps)})
        if rounded:
            words.update(self._round_to(op.out).words())
        self._records.add(activations.rms_norm, words)

    def _linear(self, x: Buffer, segments: tuple[Segment, ...]) -> None:
        outs = {segment.out.name: segment.out for segment in segments}
        places = {name: self._buffers.new(out) for name, out in outs.items()}
        bound = [
            (self._packed(s.weight), places[s.out.name].own + 4 * s.column, places[s.out.name].stride, s.bias)
            for s in segments
        ]
        self._product(x, bound, self._step.ctypes.data + 8 * R.TOKENS)

    def _product(
        self, x: Buffer, bound: list[tuple[Packed, int, int, Weight | None]], count: int, source: Place | None = None
    ) -> None:
        """Records of one product: segments of one format share a record. `source`: where x is, if not in its buffer."""
        forms = sorted({packed.form for packed, *_ in bound})
        for form in forms:
            of_form = [entry for entry in bound if entry[0].form == form]
            table = np.zeros((len(of_form), R.SEGMENT_WORDS), np.int64)
            for row, (packed, out, stride, bias) in zip(table, of_form, strict=True):
                row[:] = packed.segment
                row[R.S_OUT], row[R.S_OUT_STRIDE] = out, stride
                row[R.S_BIAS] = self._vector(bias) if bias else 0
            self._keep.append(table)
            words = {
                R.SEGMENTS: table.ctypes.data, R.SEGMENT_COUNT: len(table), R.PANELS: int(table[:, R.S_PANELS].sum()),
                R.COUNT: count, R.FACTOR: float_bits(1 / 127 if form in (R.NF4, R.NF4_SINGLE) else 1.0),
            }  # fmt: skip
            if self._exact or form in R.FLOATS:
                place = source or self._buffers[x]
                words.update({R.X: place.address, R.X_STRIDE: place.stride, R.TABLE: self._tables[1].ctypes.data})
            else:
                rounded = self._round_of(x)
                words.update(rounded.operands())
                words[R.TABLE] = self._tables[0].ctypes.data
            words.update(self._scratch(len(of_form[0][0].weight.columns)))
            self._records.add(linear(form, self._exact), words, barrier=form == forms[-1])

    def _scratch(self, columns: int) -> dict[int, int]:
        """Memory of each thread for one record: a decoded row, or the sums of a panel's spans.

        Products without a barrier between them must not share it: there are no more in a row than formats.
        """
        row = 4 * columns + BLOCK if PANEL_ROWS == 1 else 4 * PANEL_ROWS * (columns // (BLOCK * R.SPAN) + 1)
        turn = self._records.count % R.FORMATS
        if (columns, turn) not in self._rooms:
            self._rooms[columns, turn] = self._buffers.take(row * self._team.threads)
        return {R.SCRATCH: self._rooms[columns, turn], R.SCRATCH_STRIDE: row, R.NUMBER: self._records.count + 1}

    def _short_conv(self, op: ShortConv) -> None:
        packed = self._packed(op.weight)
        x = self._buffers[op.x]
        # The interleave of two tokens lives for this operation only.
        both = Buffer(f"{op.out.name}.taps", 2 * op.x.width, op.weight.columns)
        place = Place(self._interleaved(both.width), stride_bytes(both.width), 0)
        words = {
            **_between(x, place, op.x.width),
            R.STATE: self._cache.states[op.state], R.STATE_STRIDE: self._cache.state_bytes[op.state],
        }  # fmt: skip
        if self._is_integer(op):
            words.update(self._round_to(both).words())
        self._records.add(activations.taps, words)
        out = self._buffers.new(op.out)
        self._product(both, [(packed, out.own, out.stride, op.bias)], self._step.ctypes.data + 8 * R.TOKENS, place)

    def _interleaved(self, width: int) -> int:
        if not hasattr(self, "_taps"):
            self._taps: dict[int, int] = {}
        if width not in self._taps:
            self._taps[width] = self._buffers.take(self.tokens * stride_bytes(width))
        return self._taps[width]

    def _rope_and_store(self, op: RopeAndStore) -> None:
        q, k, v = (self._buffers[heads.buffer] for heads in (op.q, op.k, op.v))
        out = self._buffers.new(op.out)
        if op.rope not in self._rope_tables:
            self._rope_tables[op.rope] = rope_tables(op.rope, self._cache.max_positions)
        cosines, sines = self._rope_tables[op.rope]
        words = {
            R.A_Q: q.address, R.A_Q_STRIDE: q.stride, R.A_Q_FIRST: 4 * op.q.first, R.A_Q_STEP: 4 * op.q.step,
            R.A_K: k.address, R.A_K_STRIDE: k.stride, R.A_K_FIRST: 4 * op.k.first, R.A_K_STEP: 4 * op.k.step,
            R.A_V: v.address, R.A_V_STRIDE: v.stride, R.A_V_FIRST: 4 * op.v.first, R.A_V_STEP: 4 * op.v.step,
            R.A_Q_HEADS: op.q.count, R.A_KV_HEADS: op.k.count, R.A_DIM: op.q.dim,
            R.A_OUT: out.address, R.A_OUT_STRIDE: out.stride,
            R.A_COS: cosines.ctypes.data, R.A_SIN: sines.ctypes.data,
            **self._cache_words(op.layer),
        }  # fmt: skip
        self._records.add(attention.rope_and_store(int(self._cache.half)), words)

    def _cache_words(self, layer: int) -> dict[int, int]:
        cache = self._cache
        return {
            R.A_KEYS: cache.keys[layer], R.A_VALUES: cache.values[layer], R.A_PAGE_BYTES: cache.page_bytes[layer],
        }  # fmt: skip

    def _attention(self, op: Attention) -> None:
        q, out = self._buffers[op.q], self._buffers.new(op.out)
        kv_of = np.array(op.kv_of, np.int32)
        self._keep.append(kv_of)
        pieces = -(-self._cache.max_positions // PIECE)
        if not hasattr(self, "_parts"):
            self._parts: dict[tuple[int, int], int] = {}
        shape = (op.heads, op.head_dim)
        if shape not in self._parts:
            row = 4 * (-(-op.head_dim // 16) * 16 + 16)
            self._parts[shape] = self._buffers.take(min(FEW_TOKENS, self.tokens) * op.heads * pieces * row)
        words = {
            R.A_Q: q.address, R.A_Q_STRIDE: q.stride, R.A_Q_HEADS: op.heads, R.A_DIM: op.head_dim,
            R.A_OUT: out.own, R.A_OUT_STRIDE: out.stride, R.A_KV_OF: kv_of.ctypes.data,
            R.A_SCALE: float_bits(op.scale), R.A_PARTS: self._parts[shape], R.A_PART_TOKENS: pieces,
            R.A_SCRATCH: self._scores, **self._cache_words(op.layer),
        }  # fmt: skip
        half = int(self._cache.half)
        few, many = attention.attend_pieces(half), attention.attend_whole(half)
        self._records.add([few, few, many], words)
        self._records.add([attention.join_pieces, attention.join_pieces, activations.nothing], words)

    def _exchange(self, op: AllReduce) -> None:
        size = self.program.share.size
        if size == 1:
            self._buffers.alias(op.out, op.x)
            return
        call = self._all_reduce
        assert call is not None
        x, out = self._buffers[op.x], self._buffers.new(op.out)
        words = {R.SEND: x.address, R.ROW_FLOATS: x.stride // 4, R.FUNCTION: call.function}
        if call.kind == "mpi":
            words.update({R.RECEIVE: out.address, R.DATATYPE: call.handles[0], R.OPERATION: call.handles[1]})
            words[R.COMMUNICATOR] = call.handles[2]
            self._records.add(exchange.mpi_all_reduce, words)
            return
        if not hasattr(self, "_received"):
            widest = max(op.x.width for op in self.program.operations if isinstance(op, AllReduce))
            self._received = self._buffers.take(size * self.tokens * stride_bytes(widest))
        words.update({R.RECEIVE: self._received, R.DATATYPE: call.handles[0], R.COMMUNICATOR: call.handles[1]})
        self._records.add(exchange.all_gather, words)
        received = Place(self._received, x.stride, 0)
        self._records.add(activations.sum_parts, {**_between(received, out, op.x.width), R.PARTS: size})

    def _head(self, op: Logits) -> None:
        packed = self._packed(op.weight)
        x = self._buffers[op.x]
        # Only the tokens whose logits are wanted: a buffer of their own.
        chosen = Buffer("wanted", op.x.width, op.x.own)
        place = Place(self._buffers.take(self.wanted * stride_bytes(op.x.width)), stride_bytes(op.x.width), 0)
        words = _between(x, place, op.x.width)
        if self._is_integer(op):
            words.update(self._round_to(chosen).words())
        self._records.add(activations.select, words)
        stride = stride_bytes(op.out.width)
        self._logits_place = Place(self._buffers.take(self.wanted * stride), stride, 0)
        self._product(
            chosen, [(packed, self._logits_place.address, stride, None)], self._step.ctypes.data + 8 * R.WANTED, place
        )

    def _logits_view(self) -> NDArray[np.float32]:
        place, width = self._logits_place, len(_head_rows(self.program))
        memory = np.ctypeslib.as_array(_pointer(place.address), (self.wanted * place.stride // 4,))
        return memory.reshape(self.wanted, -1)[:, :width]

    # Activations as int8

    def _is_integer(self, op: Operation) -> bool:
        """Whether any product of this operation takes int8 activations."""
        if self._exact:
            return False
        match op:
            case Linear(segments=segments):
                used = [segment.weight for segment in segments]
            case ShortConv(weight=weight) | Logits(weight=weight):
                used = [weight]
            case _:
                return False
        return any(self._packed(weight).form not in R.FLOATS for weight in used)

    def _round_to(self, x: Buffer) -> "_Rounded":
        """Memory for x as int8, which whoever computes x fills. Buffers of one width share it, one after another."""
        if x.width not in self._rounded:
            most = max(self.tokens, self.wanted)
            blocks = -(-x.width // BLOCK)
            stride, scales_stride = BLOCK * blocks, 4 * (blocks + 16)
            memory = _Rounded(
                self._buffers.take(most * stride), stride,
                self._buffers.take(most * scales_stride), self._buffers.take(most * scales_stride), scales_stride,
            )  # fmt: skip
        else:
            memory = self._rounded[x.width][0]
        self._rounded[x.width] = memory, x.name
        return memory

    def _round_of(self, x: Buffer) -> "_Rounded":
        """x as int8, rounded here if nobody has."""
        if x.width in self._rounded and self._rounded[x.width][1] == x.name:
            return self._rounded[x.width][0]
        memory = self._round_to(x)
        place = self._buffers[x]
        words = {R.IN: place.address, R.IN_STRIDE: place.stride, R.WIDTH: x.width}
        self._records.add(activations.quantise, {**words, **memory.words()})
        return memory

    def _packed(self, weight: Weight) -> Packed:
        packed = self._weights[weight.name, weight.kind]
        assert isinstance(packed, Packed)
        return packed

    def _vector(self, weight: Weight) -> int:
        vector = self._weights[weight.name, weight.kind]
        assert isinstance(vector, Vector)
        return vector.values.ctypes.data


class _Rounded:
    """Activations as int8 with a scale, and a sum, per block of 64."""

    def __init__(self, values: int, stride: int, scales: int, sums: int, scales_stride: int) -> None:
        self._words = (values, stride, scales, sums, scales_stride)

    def words(self) -> dict[int, int]:
        """As the place that a kernel writes."""
        return dict(zip((R.Q, R.Q_STRIDE, R.Q_SCALES, R.Q_SUMS, R.Q_SCALES_STRIDE), self._words, strict=True))

    def operands(self) -> dict[int, int]:
        """As what a product reads."""
        return dict(zip((R.X, R.X_STRIDE, R.X_SCALES, R.X_SUMS, R.X_SCALES_STRIDE), self._words, strict=True))


def _between(x: Place, out: Place, width: int) -> dict[int, int]:
    return {R.IN: x.address, R.IN_STRIDE: x.stride, R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: width}


def _head_rows(program: Program) -> range:
    (logits,) = (op for op in program.operations if isinstance(op, Logits))
    return range(logits.weight.rows.start, logits.weight.rows.stop)


def _pointer(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_float))


def rope_tables(rope: Rope, positions: int) -> NDArray[np.float32]:
    """(2, positions, dim / 2) float32: cosines and sines of position * theta^(-2j / dim), in float32."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    frequencies = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)])


def _tables() -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The values of the codes as kernels look them up: as bytes of 127ths, and exactly."""
    rounded = np.rint(NF4_CODE * 127).astype(np.int8)
    if PANEL_ROWS == 1:
        # Pairs by the published byte: the high half is the first.
        high, low = np.divmod(np.arange(256), 16)
        return np.stack([rounded[high], rounded[low]], 1), np.stack([NF4_CODE[high], NF4_CODE[low]], 1)
    from tpcpu.kernels.simd import instructions

    biased = (rounded.astype(np.int16) + instructions.WEIGHT_BIAS).astype(np.uint8).view(np.int8)
    return np.tile(biased, 4), NF4_CODE.copy()
