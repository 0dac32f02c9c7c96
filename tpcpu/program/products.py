"""Products of a compiled program: records of packed weights, and of what rounds and copies their activations.

Knows formats, and where every thread keeps copies of one token; nothing of which operations there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpcpu.formats import mxfp4
from tpcpu.formats.nf4 import CODES
from tpcpu.kernels import activations
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel
from tpcpu.kernels.isa import selected
from tpcpu.program.memory import Buffers, Place, Records, stride_bytes
from tpcpu.program.operations import BLOCK, Buffer, Key, LinearByHeads, Weight
from tpcpu.program.weights import PANEL_ROWS, Packed, Stored, Table, Vector, float_bits

if selected().panel_rows == 1:
    from tpcpu.kernels.by_heads_plain import by_heads, turned_by_heads
    from tpcpu.kernels.by_heads_plain import room_bytes as head_room_bytes
    from tpcpu.kernels.linear_plain import linear, linear_of_one
    from tpcpu.kernels.linear_plain import linear as gemm
else:
    from tpcpu.kernels.by_heads import by_heads, turned_by_heads
    from tpcpu.kernels.by_heads import room_bytes as head_room_bytes
    from tpcpu.kernels.gemm import gemm, room_bytes
    from tpcpu.kernels.linear import linear, linear_of_one

Weights = Mapping[Key, Packed | Table | Vector]


@dataclass(frozen=True)
class Bound:
    """A packed weight of a product, and where the result goes; `out_of_one`: of one token, if that is elsewhere."""

    packed: Packed
    out: int
    stride: int
    bias: Weight | None
    out_of_one: int = 0


@dataclass(frozen=True)
class Input:
    """What a product reads: activations `x`, which lie at `place`.

    In steps of one token every thread reads its copy of them: of float32 at `copies`, where there are any (0: none),
    rounded where `is_rounded` says that copies were rounded as they were made. `counted`: the address of the number of
    tokens. Without `private`, what is rounded was so by all threads together.
    """

    x: Buffer
    place: Place
    counted: int
    copies: int = 0
    is_rounded: bool = False
    private: bool = True


class Rounded:
    """Activations as int8 with a scale, and a sum, per block of 64."""

    def __init__(self, values: int, stride: int, scales: int, sums: int, scales_stride: int) -> None:
        self._words = (values, stride, scales, sums, scales_stride)

    def words(self) -> dict[int, int]:
        """As the place that a kernel writes."""
        return dict(zip((R.Q, R.Q_STRIDE, R.Q_SCALES, R.Q_SUMS, R.Q_SCALES_STRIDE), self._words, strict=True))

    def operands(self) -> dict[int, int]:
        """As what a product reads."""
        return dict(zip((R.X, R.X_STRIDE, R.X_SCALES, R.X_SUMS, R.X_SCALES_STRIDE), self._words, strict=True))


class Products:
    """Writes records of products. `rows`: the most tokens that are rounded at once, of which every thread has one."""

    def __init__(
        self, weights: Weights, buffers: Buffers, records: Records, *, threads: int, rows: int, exact: bool
    ) -> None:
        self._weights, self._buffers, self._records = weights, buffers, records
        self._threads, self._rows, self.exact = threads, max(rows, threads), exact
        self._rounded: dict[int, tuple[Rounded, str]] = {}
        self._rooms: dict[tuple[int, int], int] = {}
        self._gemm_rooms: dict[int, int] = {}
        self._head_rooms: dict[int, int] = {}
        self._copy_rows: dict[tuple[type, int], int] = {}
        self._tables = {codebook: _tables(code, 127) for codebook, code in CODES.items()}
        self._tables["mxfp4"] = _tables(mxfp4.CODE, mxfp4.STEPS)
        self.keep: list[object] = [self._tables]
        """What records name the addresses of."""

    def is_integer(self, multiplied: Iterable[Weight]) -> bool:
        """Whether any product of these weights takes int8 activations."""
        return not self.exact and any(self.packed(weight).form not in R.FLOATS for weight in multiplied)

    def packed(self, weight: Weight) -> Packed:
        packed = self._weights[weight.key]
        assert isinstance(packed, Packed)
        return packed

    def vector(self, weight: Weight) -> int:
        vector = self._weights[weight.key]
        assert isinstance(vector, Vector)
        return vector.values.ctypes.data

    def copies(self, kind: type, width: int) -> dict[int, int]:
        """Memory for each thread's copy of the results of one kind of operation and one width."""
        if (kind, width) not in self._copy_rows:
            self._copy_rows[kind, width] = self._buffers.take(self._threads * stride_bytes(width))
        return {R.ROW: self._copy_rows[kind, width], R.ROW_STRIDE: stride_bytes(width)}

    def copies_of(self, kind: type, x: Buffer) -> int:
        """Where threads have their copies of x, which an operation of that kind made."""
        return self._copy_rows[kind, x.width]

    def round_to(self, x: Buffer) -> Rounded:
        """Memory for x as int8, which whoever computes x fills. Buffers of one width share it, one after another."""
        if x.width not in self._rounded:
            blocks = -(-x.width // BLOCK)
            stride, scales_stride = BLOCK * blocks, 4 * (blocks + 16)
            memory = Rounded(
                self._buffers.take(self._rows * stride), stride,
                self._buffers.take(self._rows * scales_stride), self._buffers.take(self._rows * scales_stride),
                scales_stride,
            )  # fmt: skip
        else:
            memory = self._rounded[x.width][0]
        self._rounded[x.width] = memory, x.name
        return memory

    def round(self, x: Buffer, place: Place) -> None:
        """Rounds x where nobody has done so."""
        if x.width in self._rounded and self._rounded[x.width][1] == x.name:
            return
        memory = self.round_to(x)
        words = {R.IN: place.address, R.IN_STRIDE: place.stride, R.WIDTH: x.width}
        several = activations.quantise
        self._records.add([activations.quantise_one, several, several], {**words, **memory.words()})

    def add(self, read: Input, bound: Sequence[Bound]) -> None:
        """Records of one product: segments of one format, and one codebook, share a record."""
        x, place = read.x, read.place
        stored = sorted({each.packed.stored for each in bound})
        if not read.is_rounded and any(map(self.multiplies_integers, stored)):
            self.round(x, place)
        for one in stored:
            of_one = [each for each in bound if each.packed.stored == one]
            table = np.zeros((len(of_one), R.SEGMENT_WORDS), np.int64)
            for row, each in zip(table, of_one, strict=True):
                row[:] = each.packed.segment
                row[R.S_OUT], row[R.S_OUT_STRIDE] = each.out, each.stride
                row[R.S_OUT_ONE] = each.out_of_one or each.out
                row[R.S_BIAS] = self.vector(each.bias) if each.bias else 0
            self.keep.append(table)
            words = {
                R.SEGMENTS: table.ctypes.data, R.SEGMENT_COUNT: len(table), R.PANELS: int(table[:, R.S_PANELS].sum()),
                R.COUNT: read.counted,
            }  # fmt: skip
            words.update(self.activations(one, read))
            words.update(self.settings(one, len(of_one[0].packed.weight.columns)))
            self._records.add(self.kernels(one), words, apart=one == stored[-1])

    def add_by_heads(self, op: LinearByHeads, x: Place, counted: int, out: Place) -> None:
        """The record of a product by heads, which is the same for every number of tokens."""
        packed = self.packed(op.weight)
        table = packed.segment[None].copy()
        self.keep.append(table)
        stride = head_room_bytes(op.rows, op.weight.full_columns)
        if stride not in self._head_rooms:
            self._head_rooms[stride] = self._buffers.take(stride * self._threads)
        words = {
            R.X: x.address + 4 * op.x.first, R.X_STRIDE: x.stride, R.SEGMENTS: table.ctypes.data, R.COUNT: counted,
            R.TABLE: self._tables[packed.codebook][1].ctypes.data, R.ROOM: self._head_rooms[stride],
            R.ROOM_STRIDE: stride, R.H_HEADS: op.x.count, R.H_X_STEP: 4 * op.x.step, R.H_ROWS: op.rows,
            R.H_FIRST: op.first, R.H_STEP: op.step, R.H_OUT: out.own, R.H_OUT_STRIDE: out.stride,
            R.H_OUT_STEP: 4 * op.dim,
        }  # fmt: skip
        self._records.add((turned_by_heads if op.turned else by_heads)(packed.form), words)

    def multiplies_integers(self, stored: Stored) -> bool:
        """Whether weights of a format meet int8 activations."""
        return not self.exact and stored[0] not in R.FLOATS

    def kernels(self, stored: Stored) -> list[Kernel]:
        """What multiplies, by class of token counts."""
        form = stored[0]
        return [linear_of_one(form, self.exact), linear(form, self.exact), gemm(form, self.exact)]

    def activations(self, stored: Stored, read: Input) -> dict[int, int]:
        """The words of what a product of a format reads, which has been rounded where it needs that."""
        if not self.multiplies_integers(stored):
            words = {R.X: read.place.address, R.X_STRIDE: read.place.stride}
            return words | {R.X_ONE: read.copies or read.place.address, R.IS_PRIVATE: int(read.copies != 0)}
        rounded, name = self._rounded[read.x.width]
        assert name == read.x.name, (name, read.x)
        words = rounded.operands()
        return words | {R.X_ONE: words[R.X], R.IS_PRIVATE: int(read.private)}

    def settings(self, stored: Stored, columns: int) -> dict[int, int]:
        """The words of the next record that depend on a format, and the memory that its product needs."""
        form, codebook = stored
        table = self._tables[codebook][0 if self.multiplies_integers(stored) else 1].ctypes.data
        steps = {R.NF4: 127, R.NF4_SINGLE: 127, R.MXFP4: mxfp4.STEPS}.get(form, 1)
        return {R.TABLE: table, R.FACTOR: float_bits(1 / steps), **self._scratch(columns), **self._room(form)}

    def _room(self, form: int) -> dict[int, int]:
        """Memory of each thread for a product with many tokens, which leaves nothing there; plain kernels need none."""
        if PANEL_ROWS == 1:
            return {}
        stride = room_bytes(self.exact, form)
        if stride not in self._gemm_rooms:
            self._gemm_rooms[stride] = self._buffers.take(stride * self._threads)
        return {R.ROOM: self._gemm_rooms[stride], R.ROOM_STRIDE: stride}

    def _scratch(self, columns: int) -> dict[int, int]:
        """Memory of each thread for one record: a decoded row, or the sums of a panel's spans.

        Products without a barrier between them must not share it: there are no more in a row than formats (a product
        has no more segments than that).
        """
        row = 4 * columns + BLOCK if PANEL_ROWS == 1 else 4 * PANEL_ROWS * (columns // (BLOCK * R.SPAN) + 1)
        turn = self._records.count % R.FORMATS
        if (columns, turn) not in self._rooms:
            self._rooms[columns, turn] = self._buffers.take(row * self._threads)
        return {R.SCRATCH: self._rooms[columns, turn], R.SCRATCH_STRIDE: row, R.NUMBER: self._records.count + 1}


def _tables(code: NDArray[np.float32], steps: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The values of 4-bit codes as kernels look them up: as bytes that count so many steps to 1, and exactly."""
    rounded = np.rint(code * steps).astype(np.int8)
    if PANEL_ROWS == 1:
        # Pairs by the published byte: the high half is the first.
        high, low = np.divmod(np.arange(256), 16)
        return np.stack([rounded[high], rounded[low]], 1), np.stack([code[high], code[low]], 1)
    from tpcpu.kernels.simd import instructions

    biased = (rounded.astype(np.int16) + instructions.WEIGHT_BIAS).astype(np.uint8).view(np.int8)
    return np.tile(biased, 4), code.copy()
