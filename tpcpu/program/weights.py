"""Weights as kernels read them, and how they get there: packed into panels by the threads that will read them.

Knows memory layouts and formats by their kernels; nothing of checkpoints and models.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.formats import mxfp4
from tpcpu.formats.tables import DYNAMIC_MAP, NF4_CODE
from tpcpu.kernels import fill, pack
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel
from tpcpu.kernels.isa import selected
from tpcpu.parallel.numa import Arena
from tpcpu.parallel.team import Team
from tpcpu.program.operations import BLOCK, Weight

PANEL_ROWS = selected().panel_rows

ELEMENT_BYTES = {R.BF16: 2, R.F16: 2, R.FLOAT32: 4}

_SCALE_BYTES = {R.NF4: 1, R.NF4_SINGLE: 4, R.INT8: 4, R.MXFP4: R.HALVES}
"""Of a block."""


def float_bits(value: float) -> int:
    """The bits of a float32, as a word of a record holds them."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Source:
    """A rank's rows and columns of a matrix in a published layout, before packing.

    Arrays are two-dimensional, one row per row of the matrix, the last axis contiguous: `values` holds 4-bit codes
    two to a byte (columns / 2 uint8), int8, or floats; `scales` holds scale codes (uint8) or scales (float32), one
    per block, or powers (uint8), one per half of a block. `groups` are the float32 scales of groups of 256 blocks, from
    the group `first_group` of the whole tensor on; `code` the 256 values of scale codes. `mapped`: `values` lie in a
    mapped file, whose pages are given back as they are packed; never say so of memory that holds the only copy.
    `codebook`: whose 16 values 4-bit codes stand for, `nf4`, `fp4` or `mxfp4`.
    """

    form: int
    values: NDArray[Any]
    scales: NDArray[Any] | None = None
    groups: NDArray[np.float32] | None = None
    first_group: int = 0
    code: NDArray[np.float32] | None = None
    offset: float = 0.0
    mapped: bool = False
    codebook: str = "nf4"


@dataclass(frozen=True)
class Draw:
    """How a region is filled: a kernel and its numbers, see `kernels.fill`."""

    kernel: Kernel
    seed: int
    bits: int = 0
    kept: int = -1
    middle: float = 0.0
    spread: float = 0.0

    def record(self, address: int, nbytes: int, units: int) -> NDArray[np.int64]:
        """Fills `nbytes` at `address`; threads divide the `units` of equal size that it consists of."""
        record = np.zeros((1, R.RECORD_WORDS), np.int64)
        record[0, R.KERNELS : R.KERNELS + 3] = self.kernel.address
        record[0, R.BARRIER], record[0, R.STEP] = 0b111, _IDLE_STEP.ctypes.data
        record[0, R.N_OUT], record[0, R.N_UNITS], record[0, R.N_UNIT_BYTES] = address, units, nbytes // units
        record[0, R.N_SEED], record[0, R.N_SET], record[0, R.N_KEPT] = self.seed, self.bits, self.kept
        record[0, R.N_MIDDLE], record[0, R.N_SPREAD] = float_bits(self.middle), float_bits(self.spread)
        return record


SCALE_SPREAD = 0.2
"""Scales of random weights lie so far, in parts of their mean, to either side of it."""


@dataclass(frozen=True)
class Noise:
    """Random contents of a matrix: every code as likely as any other, the weights' standard deviation as told."""

    form: int
    deviation: float
    seed: int

    def draws(self) -> tuple[Draw, Draw | None]:
        """For the values and for the scales."""
        other = self.seed + (1 << 32)
        match self.form:
            case R.NF4:
                return Draw(fill.fill_bytes, self.seed), Draw(fill.fill_bytes, other)
            case R.INT8:
                # The lowest bit keeps bytes away from -128, which no format stores.
                scale = self.deviation / (256 / math.sqrt(12))
                scales = Draw(fill.fill_float32, other, middle=scale, spread=SCALE_SPREAD * scale)
                return Draw(fill.fill_bytes, self.seed, bits=0x0101010101010101), scales
            case R.MXFP4:
                # The nearest power of two, the same for all.
                scale = self.deviation / float(np.sqrt(np.mean(np.square(mxfp4.CODE))))
                power = round(math.log2(scale)) + mxfp4.BIAS
                same = Draw(fill.fill_bytes, other, bits=power * 0x0101010101010101, kept=0)
                return Draw(fill.fill_bytes, self.seed), same
        kernel = fill.fill_bf16 if self.form == R.BF16 else fill.fill_float32
        return Draw(kernel, self.seed, spread=math.sqrt(3) * self.deviation), None

    def tables(self, weight: Weight) -> Source:
        """A source of which only the tables of the scales are used."""
        nothing = np.empty((0, 0), np.uint8)
        if self.form != R.NF4:
            return Source(self.form, nothing, codebook="mxfp4" if self.form == R.MXFP4 else "nf4")
        mean = self.deviation / float(np.sqrt(np.mean(np.square(NF4_CODE))))
        used = (weight.rows * (weight.full_columns // BLOCK)).blocks(256)
        groups = np.full(len(used), SCALE_SPREAD * mean, np.float32)
        return Source(self.form, nothing, None, groups, used.start, DYNAMIC_MAP, mean)


NOISE_FORMS = (R.NF4, R.INT8, R.MXFP4, R.BF16, R.FLOAT32)
"""Formats that can be filled with noise."""


Stored = tuple[int, str]
"""A format as kernels number it, and the codebook of its codes."""


@dataclass(frozen=True)
class Packed:
    """A matrix in memory: the words of its segment, and what keeps them alive."""

    weight: Weight
    form: int
    segment: NDArray[np.int64]
    nbytes: int
    keep: tuple[Any, ...]
    codebook: str = "nf4"

    @property
    def stored(self) -> Stored:
        return self.form, self.codebook


@dataclass(frozen=True)
class Table:
    """An embedding: its rows lie in the mapped checkpoint, once per host."""

    rows: NDArray[Any]
    form: int


@dataclass(frozen=True)
class Vector:
    """A norm's weight or a bias, float32, followed by zeros up to a whole block."""

    values: NDArray[np.float32]


def padded(values: NDArray[Any]) -> Vector:
    """`values` as float32, with room for kernels to read whole registers behind the end."""
    out = np.zeros(-(-len(values) // BLOCK) * BLOCK + BLOCK, np.float32)
    out[: len(values)] = values
    return Vector(out)


def packed_bytes(rows: int, columns: int, form: int) -> int:
    """Bytes of arena that `pack_matrix` needs."""
    values, scales = _sizes(rows, columns, form)
    return _aligned(values) + _aligned(scales)


def _sizes(rows: int, columns: int, form: int) -> tuple[int, int]:
    """Bytes of packed values and scales."""
    held = -(-rows // PANEL_ROWS) * PANEL_ROWS
    if form in ELEMENT_BYTES:
        return held * columns * ELEMENT_BYTES[form], 0
    blocks = held * (columns // BLOCK)
    return blocks * (BLOCK if form == R.INT8 else BLOCK // 2), blocks * _SCALE_BYTES[form]


def panel_bytes(columns: int, form: int) -> tuple[int, int]:
    """Bytes of a panel's values and of its scales."""
    return _sizes(PANEL_ROWS, columns, form)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def packing_kernels(forms: Iterable[int]) -> set[Kernel]:
    """What packs weights of these formats, scales included."""
    scales = {R.NF4: 1, R.NF4_SINGLE: 4, R.INT8: 4, R.MXFP4: 1}
    wanted = set(forms)
    return {_packer(form) for form in wanted} | {pack.pack_elements(scales[form]) for form in wanted & set(scales)}


def code_table(code: NDArray[np.float32]) -> NDArray[np.float32]:
    """The 256 values of scale codes as kernels look them up: as they are, then their bytes in four planes of 256."""
    planes = np.ascontiguousarray(code.view(np.uint8).reshape(-1, 4).T)
    return np.concatenate([code, planes.reshape(-1).view(np.float32)])


class Packer:
    """Packs the matrices of one rank, one after another, into an arena; their kernels must have been prepared."""

    def __init__(self, team: Team, arena: Arena) -> None:
        self._team = team
        self._arena = arena
        self._used = 0
        self._waiting: list[NDArray[np.int64]] = []
        self._waiting_bytes = 0

    def pack(self, weight: Weight, source: Source) -> Packed:
        """Copies `source` into panels. Every thread writes the panels that it packs: first touch places the pages."""
        rows, columns = len(weight.rows), len(weight.columns)
        values, scales = self._places(weight, source.form)
        jobs = []
        if rows and columns:
            units = _units(columns, source.form)
            jobs.append(self._job(_packer(source.form), source.values, rows, units, values, source.mapped))
            if source.scales is not None:
                jobs.append(self._scales(source.scales, rows, source.scales.shape[1], scales))
        if jobs:
            self._team.run(np.concatenate(jobs))
        return self._finish(weight, source, values, scales)

    def fill(self, weight: Weight, noise: Noise) -> Packed:
        """Random contents in the place of a source's, written by `flush` at the latest.

        Many at a time, by the threads that would pack them: for the small matrices of experts threads would wait for
        each other longer than they write.
        """
        values, scales = self._places(weight, noise.form)
        panels = -(-len(weight.rows) // PANEL_ROWS)
        regions = zip((values, scales), _sizes(len(weight.rows), len(weight.columns), noise.form), strict=True)
        drawn = zip(regions, noise.draws(), strict=True)
        for (address, nbytes), draw in drawn:
            if draw and nbytes:
                self._waiting.append(draw.record(address, nbytes, panels))
                self._waiting_bytes += nbytes
        if self._waiting_bytes > _TOGETHER:
            self.flush()
        return self._finish(weight, noise.tables(weight), values, scales)

    def flush(self) -> None:
        """Writes what still waits to be filled."""
        if self._waiting:
            records = np.concatenate(self._waiting)
            records[:-1, R.BARRIER] = 0
            self._team.run(records)
            self._waiting, self._waiting_bytes = [], 0

    def _places(self, weight: Weight, form: int) -> tuple[int, int]:
        """Addresses for packed values and for scales."""
        values, scales = _sizes(len(weight.rows), len(weight.columns), form)
        return self._take(values), self._take(scales)

    def _finish(self, weight: Weight, source: Source, values: int, scales: int) -> Packed:
        """What lies in its places, with the tables of its scales."""
        rows, columns = len(weight.rows), len(weight.columns)
        segment = np.zeros(R.SEGMENT_WORDS, np.int64)
        segment[R.S_VALUES], segment[R.S_SCALES] = values, scales
        segment[R.S_ROWS], segment[R.S_COLUMNS] = rows, columns
        segment[R.S_PANELS] = -(-rows // PANEL_ROWS)
        keep: list[Any] = []
        if source.form == R.NF4:
            assert source.groups is not None
            assert source.code is not None
            # Rows that fill up the last panel look behind the last group.
            blocks = weight.full_columns // BLOCK
            behind = PANEL_ROWS * blocks // 256 + 2
            groups = np.concatenate([source.groups, np.zeros(behind, np.float32)])
            code = code_table(source.code)
            keep = [groups, code]
            segment[R.S_GROUPS] = groups.ctypes.data - 4 * source.first_group
            segment[R.S_CODE] = code.ctypes.data
            segment[R.S_OFFSET] = float_bits(source.offset)
            segment[R.S_FULL_BLOCKS] = blocks
            segment[R.S_FIRST_BLOCK] = weight.rows.start * blocks + weight.columns.start // BLOCK
        groups_bytes = 0 if source.groups is None else source.groups.nbytes
        nbytes = sum(_sizes(rows, columns, source.form)) + groups_bytes
        return Packed(weight, source.form, segment, nbytes, (self._arena, *keep), source.codebook)

    def _take(self, nbytes: int) -> int:
        address = self._arena.address + self._used
        self._used += _aligned(nbytes)
        assert self._used <= self._arena.nbytes
        return address

    def _scales(self, scales: NDArray[Any], rows: int, blocks: int, out: int) -> NDArray[np.int64]:
        """Scales, or their codes or powers, block by block, the rows of a panel together."""
        return self._job(pack.pack_elements(scales.itemsize), scales, rows, blocks, out)

    def _job(
        self, kernel: Kernel, source: NDArray[Any], rows: int, columns: int, out: int, mapped: bool = False
    ) -> NDArray[np.int64]:
        assert source.strides[1] == source.itemsize
        record = np.zeros((1, R.RECORD_WORDS), np.int64)
        record[0, R.KERNELS : R.KERNELS + 3] = kernel.address
        record[0, R.BARRIER] = 0b111
        record[0, R.STEP] = _IDLE_STEP.ctypes.data
        record[0, R.P_SOURCE], record[0, R.P_ROW_BYTES] = source.ctypes.data, source.strides[0]
        record[0, R.P_ROWS], record[0, R.P_COLUMNS], record[0, R.P_OUT] = rows, columns, out
        record[0, R.P_MAPPED] = mapped
        return record


_TOGETHER = 2**26
"""Bytes that are filled between two waits."""

_IDLE_STEP = np.zeros(R.STEP_WORDS, np.int64)
"""Packing looks at no batch."""


def _units(columns: int, form: int) -> int:
    """Columns as the packing kernel of the format counts them."""
    return columns // 2 if form in (R.NF4, R.NF4_SINGLE, R.MXFP4) and PANEL_ROWS == 1 else columns


def _packer(form: int) -> Kernel:
    if form in ELEMENT_BYTES:
        return pack.pack_elements(ELEMENT_BYTES[form])
    if PANEL_ROWS == 1:
        # Plain kernels read the published layouts.
        return pack.pack_elements(1)
    return pack.pack_int8 if form == R.INT8 else pack.pack_nf4
