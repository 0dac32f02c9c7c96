"""From a checkpoint to weights in memory: each rank reads, converts and packs what its program declares.

Tensor after tensor, in one order on all ranks. Where an unquantised tensor becomes NF4, its scales depend on all of it:
each rank takes the block maxima of a part, the parts are exchanged, and every rank quantises its own slice. So the
weights are the same whatever the number of ranks.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.binding import Binding, float_dtype
from tpcpu.engine.progress import Progress
from tpcpu.errors import CheckpointError
from tpcpu.formats import floats, int8, nf4
from tpcpu.formats.tables import DYNAMIC_MAP, NEAREST_CODE
from tpcpu.kernels import quantize as kernels
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import Arena, arena
from tpcpu.parallel.partition import Range, Share
from tpcpu.parallel.team import Team
from tpcpu.program.operations import BLOCK, Kind, Weight
from tpcpu.program.products import Weights
from tpcpu.program.weights import Packed, Packer, Source, Table, Vector, packed_bytes, packing_kernels, padded

GROUP = 256

_PIECE_BYTES = 8 << 20
"""Source bytes that a thread converts at a time; their pages are given back afterwards."""

NOTICED_SECONDS = 0.5
"""Loading that took less is not worth a line."""

_KERNEL_DTYPES = {floats.BFLOAT16: kernels.BF16, floats.FLOAT16: kernels.F16, floats.FLOAT32: kernels.F32}


class Loader:
    """Loads the weights of one rank. Collective: all ranks load, each its own."""

    def __init__(
        self, checkpoint: Checkpoint, communicator: Communicator, team: Team, cpus: Iterable[int], progress: Progress
    ) -> None:
        self._checkpoint, self._communicator, self._team = checkpoint, communicator, team
        self._progress = progress
        self._cpus = set(cpus)
        self._multiplied: set[str] = set()
        self.nbytes = 0
        """Bytes of weights that this rank has read,"""
        self.seconds = 0.0
        """and how long that took, repacking and all."""

    def load(self, bindings: list[Binding]) -> tuple[Weights, Arena]:
        """The weights by name and kind, and the arena that holds the packed ones. Raises CheckpointError."""
        packed = [binding for binding in bindings if _is_packed(binding.weight)]
        sizes = [packed_bytes(len(b.weight.rows), len(b.weight.columns), b.form) for b in packed]
        # Before the reading begins, so that its speed is told truly.
        prepare(packing_kernels(binding.form for binding in packed), self._progress.say)
        memory = arena(sum(sizes))
        packer = Packer(self._team, memory)
        weights: dict[tuple[str, Kind], Packed | Table | Vector] = {}
        self._multiplied.update(binding.weight.name for binding in packed)
        total = sum(self._share_bytes(binding) for binding in bindings)
        done, error = 0, None
        began = time.perf_counter()
        self._progress.advance(0, total)
        # A thread inherits the affinity of the one that makes it, and this one may be pinned.
        with ThreadPoolExecutor(len(self._cpus), initializer=os.sched_setaffinity, initargs=(0, self._cpus)) as pool:
            for binding in bindings:
                weight = binding.weight
                try:
                    weights[weight.name, weight.kind] = self._bind(binding, pool, packer)
                except CheckpointError as problem:
                    # The others go on to their next exchange: this rank has to be there.
                    error = error or problem
                done += self._share_bytes(binding)
                self._progress.advance(done, total)
        self.nbytes, self.seconds = done, time.perf_counter() - began
        self._communicator.raise_together(error)
        if self.seconds >= NOTICED_SECONDS:
            speed = self.nbytes / self.seconds / 1e9
            self._progress.say(f"read {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s, {speed:.1f} GB/s")
        return weights, memory

    def _bind(self, binding: Binding, pool: ThreadPoolExecutor, packer: Packer) -> Packed | Table | Vector:
        weight = binding.weight
        if weight.kind is Kind.VECTOR:
            return self._vector(weight)
        if weight.kind is Kind.EMBEDDING:
            return self._table(binding, pool)
        packed = packer.pack(weight, _Slicer(self._checkpoint, self._communicator, pool, binding).source())
        self._checkpoint.release(weight.name)
        return packed

    def _table(self, binding: Binding, pool: ThreadPoolExecutor) -> Table:
        """The rows where they lie. The ranks look through them together, unless they do so for the head."""
        name = binding.weight.name
        rows = self._checkpoint.array(name)
        if name not in self._multiplied:
            part = Share(self._communicator.rank, self._communicator.size).split(len(rows))
            if not _all_finite(pool, rows[part.start : part.stop]):
                raise _not_finite(self._checkpoint, name)
            self._checkpoint.release(name)
        return Table(rows, binding.form)

    def _share_bytes(self, binding: Binding) -> int:
        """Bytes of the checkpoint that this rank reads for a weight now; the embedding is read row by row, later."""
        weight = binding.weight
        if weight.kind is Kind.EMBEDDING:
            return 0
        parts = (weight.name, *nf4.part_names(weight.name), int8.scale_name(weight.name))
        stored = sum(self._checkpoint[part].nbytes for part in parts if part in self._checkpoint.tensors)
        return stored * weight.size // max(weight.full_rows * weight.full_columns, 1)

    def _vector(self, weight: Weight) -> Vector:
        values = floats.to_float32(self._checkpoint.array(weight.name))[weight.rows.start : weight.rows.stop]
        if not np.isfinite(values).all():
            raise _not_finite(self._checkpoint, weight.name)
        return padded(values)


def _is_packed(weight: Weight) -> bool:
    return weight.kind not in (Kind.VECTOR, Kind.EMBEDDING)


class _Slicer:
    """One rank's rows and columns of one tensor, in the published layout of the format that it will be held in."""

    def __init__(
        self, checkpoint: Checkpoint, communicator: Communicator, pool: ThreadPoolExecutor, binding: Binding
    ) -> None:
        self._checkpoint, self._communicator, self._pool = checkpoint, communicator, pool
        self._binding, self._weight = binding, binding.weight
        self._rows = slice(self._weight.rows.start, self._weight.rows.stop)
        self._columns = self._weight.columns

    def source(self) -> Source:
        name, stored, held = self._weight.name, self._binding.stored, self._binding.held
        get, names = self._checkpoint.array, self._checkpoint.tensors
        if stored == "nf4":
            tensor = nf4.from_tensors(name, get, names)
            if held != "nf4":
                return self._floats(floats.convert(nf4.dequantize(tensor), tensor.dtype))
            return self._stored_nf4(tensor)
        if stored == "int8":
            whole = int8.from_tensors(name, get, names)
            if held != "int8":
                return self._floats(int8.dequantize(whole))
            scales = whole.scales[self._rows, self._slice(BLOCK)]
            self._refuse_not_finite(int8.scale_name(name), scales)
            values = whole.values[self._rows, self._slice()]
            return Source(R.INT8, values, scales, mapped=self._mapped(values))
        array = self._checkpoint.array(name)
        match held:
            case "nf4":
                return self._new_nf4(array)
            case "int8":
                return self._new_int8(array)
        return self._floats(array)

    def _slice(self, unit: int = 1) -> slice:
        """The columns, counted in units of so many."""
        return slice(self._columns.start // unit, self._columns.stop // unit)

    def _mapped(self, values: NDArray[Any]) -> bool:
        """Whether these lie in the file's pages, and not in a copy."""
        name = self._weight.name
        return self._checkpoint.is_mapped(name) and np.may_share_memory(values, self._checkpoint.array(name))

    def _matrix(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(self._weight.full_rows, self._weight.full_columns)

    def _stored_nf4(self, tensor: nf4.Nf4Tensor) -> Source:
        rows, columns = self._weight.full_rows, self._weight.full_columns
        codes = tensor.codes.reshape(rows, columns // 2)[self._rows, self._slice(2)]
        scales = tensor.absmax.reshape(rows, columns // BLOCK)[self._rows, self._slice(BLOCK)]
        name = self._weight.name
        if not tensor.nested:
            self._refuse_not_finite(f"{name}.absmax", scales)
            return Source(
                R.NF4_SINGLE, codes, scales.view(np.float32), mapped=self._mapped(codes), codebook=tensor.kind
            )
        self._refuse_not_finite(f"{name}.nested_absmax", tensor.nested_absmax)
        self._refuse_not_finite(f"{name}.nested_quant_map", tensor.nested_code)
        return self._nested(
            codes, scales, tensor.nested_absmax, tensor.nested_code, float(tensor.offset), self._mapped(codes),
            tensor.kind,
        )  # fmt: skip

    def _nested(
        self, codes: NDArray[np.uint8], scales: NDArray[Any], groups: NDArray[np.float32],
        code: NDArray[np.float32], offset: float, mapped: bool = False, codebook: str = "nf4",
    ) -> Source:  # fmt: skip
        """Only those group scales are kept that this rank's rows use."""
        blocks = self._weight.full_columns // BLOCK
        used = (self._weight.rows * blocks).blocks(GROUP)
        kept = np.array(groups[used.start : used.stop], np.float32)
        return Source(R.NF4, codes, scales, kept, used.start, code, offset, mapped, codebook)

    def _floats(self, array: NDArray[Any]) -> Source:
        """Rows and columns as floats of the held format, all finite."""
        local = self._matrix(array)[self._rows, self._slice()]
        self._refuse_not_finite(self._weight.name, local)
        held = self._binding.held
        name = {"bf16": "bfloat16", "f16": "float16", "float32": "float32"}[held]
        assert floats.FLOATS[name] == float_dtype(held)
        if local.dtype != float_dtype(held):
            local = floats.convert(np.ascontiguousarray(local), name)
        return Source(self._binding.form, local, mapped=self._mapped(local))

    def _refuse_not_finite(self, name: str, values: NDArray[Any]) -> None:
        if not _all_finite(self._pool, values):
            raise _not_finite(self._checkpoint, name)

    # Quantising while loading

    def _maxima(self, matrix: NDArray[Any], rows: Range, columns: Range) -> NDArray[np.float32]:
        """Block maxima (rows, blocks) of a region; NaN where a block holds anything that is not finite."""
        blocks = len(columns) // BLOCK
        maxima = np.empty((len(rows), blocks), np.float32)
        region = matrix[rows.start : rows.stop, columns.start : columns.stop]

        def work(first: int, last: int) -> None:
            part = region[first:last]
            bad = kernels.block_maxima(
                _KERNEL_DTYPES[matrix.dtype], part.ctypes.data, last - first, blocks, matrix.strides[0],
                maxima[first:].ctypes.data, maxima.strides[0],
            )  # fmt: skip
            if bad >= 0:
                maxima[first + bad // blocks, bad % blocks] = np.nan
            self._release(matrix, rows.start + first, rows.start + last)

        if region.size:
            _in_pieces(self._pool, len(rows), len(columns) * matrix.itemsize, work)
        return maxima

    def _release(self, matrix: NDArray[Any], first: int, last: int) -> None:
        self._checkpoint.release(self._weight.name, first * matrix.strides[0], last * matrix.strides[0])

    def _new_nf4(self, array: NDArray[Any]) -> Source:
        matrix = self._matrix(array)
        rows, columns = matrix.shape
        blocks = columns // BLOCK
        size = self._communicator.size
        # Parts of equal size for the exchange; the last may reach beyond the rows.
        most = -(-rows // size)
        mine = Share(self._communicator.rank, size)
        part = Range(min(mine.rank * most, rows), min((mine.rank + 1) * most, rows))
        padded_part = np.zeros((most, blocks), np.float32)
        padded_part[: len(part)] = self._maxima(matrix, part, Range(0, columns))
        maxima = self._communicator.all_gather(padded_part).reshape(-1, blocks)[:rows].reshape(-1)
        if not np.isfinite(maxima).all():
            raise _not_finite(self._checkpoint, self._weight.name)
        offset = nf4.scale_offset(maxima)
        scales = np.empty(rows * blocks, np.uint8)
        groups = np.empty(-(-rows * blocks // GROUP), np.float32)
        kernels.nf4_scale_codes(
            maxima.ctypes.data, maxima.size, offset, NEAREST_CODE.ctypes.data, scales.ctypes.data, groups.ctypes.data
        )
        local = matrix[self._rows, self._slice()]
        local_maxima = maxima.reshape(rows, blocks)[self._rows, self._slice(BLOCK)]
        codes = np.empty((len(local), len(self._columns) // 2), np.uint8)

        def work(first: int, last: int) -> None:
            kernels.nf4_codes(
                _KERNEL_DTYPES[matrix.dtype], local[first:].ctypes.data, last - first, len(self._columns) // BLOCK,
                matrix.strides[0], local_maxima[first:].ctypes.data, 4 * blocks,
                codes[first:].ctypes.data, codes.strides[0],
            )  # fmt: skip
            self._release(matrix, self._rows.start + first, self._rows.start + last)

        if local.size:
            _in_pieces(self._pool, len(local), local.shape[1] * local.itemsize, work)
        local_scales = scales.reshape(rows, blocks)[self._rows, self._slice(BLOCK)]
        return self._nested(codes, local_scales, groups, DYNAMIC_MAP, float(offset))

    def _new_int8(self, array: NDArray[Any]) -> Source:
        matrix = self._matrix(array)
        maxima = self._maxima(matrix, self._weight.rows, self._columns)
        if not np.isfinite(maxima).all():
            raise _not_finite(self._checkpoint, self._weight.name)
        local = matrix[self._rows, self._slice()]
        values = np.empty(local.shape, np.int8)
        scales = np.empty_like(maxima)

        def work(first: int, last: int) -> None:
            kernels.int8_values(
                _KERNEL_DTYPES[matrix.dtype], local[first:].ctypes.data, last - first, maxima.shape[1],
                matrix.strides[0], maxima[first:].ctypes.data, maxima.strides[0],
                values[first:].ctypes.data, values.strides[0], scales[first:].ctypes.data, scales.strides[0],
            )  # fmt: skip
            self._release(matrix, self._rows.start + first, self._rows.start + last)

        if local.size:
            _in_pieces(self._pool, len(local), local.shape[1] * local.itemsize, work)
        return Source(R.INT8, values, scales)


def _in_pieces(pool: ThreadPoolExecutor, rows: int, row_bytes: int, work: Callable[[int, int], Any]) -> list[Any]:
    """`work(first, last)` over ranges of rows, by all threads; the results in order."""
    step = max(1, _PIECE_BYTES // max(row_bytes, 1))
    pieces = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    return list(pool.map(lambda piece: work(*piece), pieces))


def _all_finite(pool: ThreadPoolExecutor, values: NDArray[Any]) -> bool:
    """Of floats as they are stored: one dimension, or rows whose columns lie together."""
    if not values.size:
        return True
    rows = values.reshape(1, -1) if values.ndim == 1 else values
    assert rows.ndim == 2
    assert rows.strides[1] == rows.itemsize

    def work(first: int, last: int) -> bool:
        address = rows[first:].ctypes.data
        dtype = _KERNEL_DTYPES[rows.dtype]
        return bool(kernels.all_finite(dtype, address, last - first, rows.shape[1], rows.strides[0]))

    return all(_in_pieces(pool, len(rows), rows.shape[1] * rows.itemsize, work))


def _not_finite(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint[name].file}: tensor {name} holds NaN or infinity; weights must be finite, get the model anew"
    )
