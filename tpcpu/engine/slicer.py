"""One rank's rows and columns of a weight, in the format that it will be held in: as stored, or converted from it.

Where an unquantised tensor becomes NF4, its scales depend on all of it: each rank takes the block maxima of the rows
that it sees, the ranks exchange them, and every rank quantises its own slice. So the weights are the same whatever the
number of ranks.

Knows formats. Whether the values come from this host's files or from other ranks, is the supply's to know.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.binding import Binding, float_dtype
from tpcpu.engine.parts import GROUP, SCALES, Part
from tpcpu.engine.supply import Supply
from tpcpu.errors import CheckpointError
from tpcpu.formats import floats, fp8, int8, mxfp4, nf4
from tpcpu.formats.tables import DYNAMIC_MAP, NEAREST_CODE
from tpcpu.kernels import quantize as kernels
from tpcpu.kernels import record as R
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.partition import Range
from tpcpu.program.operations import BLOCK
from tpcpu.program.weights import Source

_PIECE_BYTES = 1 << 20
"""Source bytes that a thread converts at a time; their pages are given back afterwards."""

_ROWS_AT_ONCE = 1024
"""Rows that are converted to float32 together."""

_KERNEL_DTYPES = {floats.BFLOAT16: kernels.BF16, floats.FLOAT16: kernels.F16, floats.FLOAT32: kernels.F32}

Decode = Callable[[NDArray[Any], int, int], NDArray[Any]]
"""Makes floats of stored rows that begin at a row and a column of the tensor."""

_NONE = np.zeros(0, np.float32)

_HELD_DTYPES = {"bf16": "bfloat16", "f16": "float16", "float32": "float32"}


class Slicer:
    """Takes weights from a supply. Collective: all ranks ask for the same weights in the same order."""

    def __init__(
        self, checkpoint: Checkpoint, communicator: Communicator, supply: Supply, pool: ThreadPoolExecutor
    ) -> None:
        """`pool`: the threads that convert."""
        self._checkpoint, self._communicator, self._supply, self._pool = checkpoint, communicator, supply, pool

    def source(self, binding: Binding, parts: Mapping[str, Part]) -> Source:
        """This rank's region of a weight to be packed, in a published layout.

        Raises CheckpointError for values that no weight can have, on this rank alone, when all that is collective is
        done.
        """
        decode = self._decoder(binding, parts)
        if binding.held == "nf4" and binding.stored != "nf4":
            return self._new_nf4(binding, parts[""], decode)
        stored = {suffix: self._supply.fetch(part) for suffix, part in parts.items() if suffix != SCALES}
        mapped = self._supply.is_mapped(parts[""])
        if binding.weight.unit_rows:
            stored[""], mapped = _unit_rows(stored[""]), False
        if binding.stored == "nf4":
            if binding.held == "nf4":
                return self._stored_nf4(binding, stored, mapped)
            return self._floats(binding, self._dequantized(binding, stored), False)
        if binding.stored == "int8":
            scale = int8.scale_name("")
            self._refuse_not_finite(parts[scale].name, stored[scale])
            return Source(R.INT8, stored[""], stored[scale], mapped=mapped)
        if binding.stored == "mxfp4":
            return self._stored_mxfp4(binding, parts, stored)
        if binding.held == "int8":
            return self._new_int8(binding, parts[""], stored[""], decode)
        if binding.scaled is not None:
            return self._floats(binding, self._decoded(binding, parts[""], stored[""], decode), False)
        return self._floats(binding, stored[""], mapped)

    def _decoder(self, binding: Binding, parts: Mapping[str, Part]) -> Decode:
        """What makes floats of rows as they are stored, given where they begin."""
        layout = binding.scaled
        if layout is None:
            return lambda values, *_: values
        # One that is not finite makes values that are not.
        scales = floats.to_float32(np.ascontiguousarray(self._supply.fetch(parts[SCALES]))).reshape(layout.shape)
        return lambda values, row, column: fp8.dequantize(values, scales, layout.block, row, column)

    def _decoded(self, binding: Binding, part: Part, local: NDArray[Any], decode: Decode) -> NDArray[Any]:
        """This rank's region, decoded by all threads."""
        rows, columns = binding.weight.rows, binding.weight.columns
        out = np.empty(local.shape, floats.BFLOAT16)

        def work(first: int, last: int) -> None:
            out[first:last] = decode(local[first:last], rows.start + first, columns.start)
            self._use_up(part, binding, local, first, last)

        if local.size:
            self._in_pieces(local, work)
        return out

    def vector(self, binding: Binding, parts: Mapping[str, Part]) -> NDArray[np.float32]:
        """This rank's values of a vector, (rows,) float32. Raises CheckpointError as `source` does."""
        values = floats.to_float32(self._supply.fetch(parts[""]).reshape(-1))
        if not np.isfinite(values).all():
            raise self._not_finite(binding.weight.name)
        return values + np.float32(binding.weight.plus)

    def check(self, part: Part) -> None:
        """The ranks look through a tensor together that none of them needs now. Raises as `source` does."""
        finite: list[bool] = []

        def look(_: Range, values: NDArray[Any]) -> None:
            finite.append(self._all_finite(values))

        self._supply.fetch(part, look)
        if not all(finite):
            raise self._not_finite(part.name)

    def _stored_nf4(self, binding: Binding, stored: Mapping[str, NDArray[Any]], mapped: bool) -> Source:
        weight, state = binding.weight, binding.state
        assert state is not None
        codes, scales = stored[""], stored[".absmax"]
        if state.block != BLOCK:
            rows, columns = weight.rows, weight.columns
            scales = nf4.in_blocks_of_64(state, scales.reshape(-1)).reshape(weight.full_rows, -1)
            scales = scales[rows.start : rows.stop, columns.start // BLOCK : columns.stop // BLOCK]
        if not state.nested:
            self._refuse_not_finite(f"{weight.name}.absmax", scales)
            return Source(R.NF4_SINGLE, codes, scales, mapped=mapped, codebook=state.kind)
        for suffix in (".nested_absmax", ".nested_quant_map"):
            self._refuse_not_finite(f"{weight.name}{suffix}", stored[suffix])
        groups, used = stored[".nested_absmax"].reshape(-1), self._groups(binding)
        if state.block != BLOCK:
            groups = nf4.in_blocks_of_64(state, groups)[used.start : used.stop]
        code, offset = stored[".nested_quant_map"].reshape(-1), float(np.float32(state.offset))
        return Source(R.NF4, codes, scales, np.array(groups), used.start, code, offset, mapped, state.kind)

    def _stored_mxfp4(self, binding: Binding, parts: Mapping[str, Part], stored: Mapping[str, NDArray[Any]]) -> Source:
        """Codes with the first of two values in the high half, as those of all 4-bit formats are packed."""
        local, scales = stored[""], stored[mxfp4.scales_name("")]
        if scales.max(initial=0) > mxfp4.LARGEST:
            raise self._not_finite(parts[mxfp4.scales_name("")].name)
        if binding.held != "mxfp4":
            return self._floats(binding, floats.convert(mxfp4.dequantize(local, scales), "bfloat16"), False)
        codes = np.empty(local.shape, np.uint8)

        def work(first: int, last: int) -> None:
            codes[first:last] = mxfp4.high_first(local[first:last])
            self._use_up(parts[""], binding, local, first, last)

        if local.size:
            self._in_pieces(local, work)
        return Source(R.MXFP4, codes, scales, codebook="mxfp4")

    def _groups(self, binding: Binding) -> Range:
        """The groups of scales that this rank's rows use."""
        return (binding.weight.rows * (binding.weight.full_columns // BLOCK)).blocks(GROUP)

    def _dequantized(self, binding: Binding, stored: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Rows and columns of an NF4 tensor whose blocks cross rows, in the floats that it was made of."""
        weight, state = binding.weight, binding.state
        assert state is not None
        absmax, groups = stored[".absmax"].reshape(-1), stored.get(".nested_absmax", _NONE).reshape(-1)
        tensor = nf4.Nf4Tensor(
            state.shape, stored[""].reshape(-1), nf4.in_blocks_of_64(state, absmax), nf4.in_blocks_of_64(state, groups),
            np.float32(state.offset), nf4.CODES[state.kind], stored.get(".nested_quant_map", _NONE).reshape(-1),
            state.dtype, state.kind, min(state.block, BLOCK),
        )  # fmt: skip
        values = floats.convert(nf4.dequantize(tensor), tensor.dtype).reshape(weight.full_rows, weight.full_columns)
        return values[weight.rows.start : weight.rows.stop, weight.columns.start : weight.columns.stop]

    def _floats(self, binding: Binding, local: NDArray[Any], mapped: bool) -> Source:
        """Rows and columns as floats of the held format, all finite."""
        self._refuse_not_finite(binding.weight.name, local)
        if local.dtype != float_dtype(binding.held):
            local, mapped = floats.convert(np.ascontiguousarray(local), _HELD_DTYPES[binding.held]), False
        return Source(binding.form, local, mapped=mapped)

    # Quantising while loading

    def _new_nf4(self, binding: Binding, part: Part, decode: Decode) -> Source:
        weight = binding.weight
        blocks = part.columns // BLOCK
        maxima = np.zeros((part.rows, blocks), np.float32)

        def look(rows: Range, values: NDArray[Any]) -> None:
            self._maxima(part, rows.start, 0, values, maxima[rows.start : rows.stop], decode)

        local = self._supply.fetch(part, look)
        self._spread(part, maxima)
        if not np.isfinite(maxima).all():
            raise self._not_finite(weight.name)
        offset = nf4.scale_offset(maxima.reshape(-1))
        scales = np.empty(maxima.size, np.uint8)
        groups = np.empty(-(-maxima.size // GROUP), np.float32)
        kernels.nf4_scale_codes(
            maxima.ctypes.data, maxima.size, offset, NEAREST_CODE.ctypes.data, scales.ctypes.data, groups.ctypes.data
        )
        rows = slice(weight.rows.start, weight.rows.stop)
        columns = slice(weight.columns.start // BLOCK, weight.columns.stop // BLOCK)
        local_maxima = maxima[rows, columns]
        codes = np.empty((len(local), len(weight.columns) // 2), np.uint8)

        def work(first: int, last: int) -> None:
            piece = decode(local[first:last], weight.rows.start + first, weight.columns.start)
            kernels.nf4_codes(
                _KERNEL_DTYPES[piece.dtype], piece.ctypes.data, last - first, local_maxima.shape[1],
                piece.strides[0], local_maxima[first:].ctypes.data, 4 * blocks,
                codes[first:].ctypes.data, codes.strides[0],
            )  # fmt: skip
            self._use_up(part, binding, local, first, last)

        if local.size:
            self._in_pieces(local, work)
        used = self._groups(binding)
        kept = np.array(groups[used.start : used.stop])
        return Source(
            R.NF4, codes, scales.reshape(part.rows, blocks)[rows, columns], kept, used.start, DYNAMIC_MAP, float(offset)
        )

    def _new_int8(self, binding: Binding, part: Part, local: NDArray[Any], decode: Decode) -> Source:
        weight = binding.weight
        maxima = np.empty((len(local), local.shape[1] // BLOCK), np.float32)
        self._maxima(part, weight.rows.start, weight.columns.start, local, maxima, decode)
        if not np.isfinite(maxima).all():
            raise self._not_finite(binding.weight.name)
        values = np.empty(local.shape, np.int8)
        scales = np.empty_like(maxima)

        def work(first: int, last: int) -> None:
            piece = decode(local[first:last], weight.rows.start + first, weight.columns.start)
            kernels.int8_values(
                _KERNEL_DTYPES[piece.dtype], piece.ctypes.data, last - first, maxima.shape[1],
                piece.strides[0], maxima[first:].ctypes.data, maxima.strides[0],
                values[first:].ctypes.data, values.strides[0], scales[first:].ctypes.data, scales.strides[0],
            )  # fmt: skip
            self._use_up(part, binding, local, first, last)

        if local.size:
            self._in_pieces(local, work)
        return Source(R.INT8, values, scales)

    def _maxima(
        self, part: Part, row: int, column: int, values: NDArray[Any], out: NDArray[np.float32], decode: Decode
    ) -> None:
        """Block maxima, `out` (rows, blocks), of values from a row and a column of a part on.

        NaN where a block holds anything that is not finite.
        """
        blocks = out.shape[1]

        def work(first: int, last: int) -> None:
            piece = decode(values[first:last], row + first, column)
            bad = kernels.block_maxima(
                _KERNEL_DTYPES[piece.dtype], piece.ctypes.data, last - first, blocks, piece.strides[0],
                out[first:].ctypes.data, out.strides[0],
            )  # fmt: skip
            if bad >= 0:
                out[first + bad // blocks, bad % blocks] = np.nan
            self._supply.release(part, Range(row + first, row + last))

        if values.size:
            self._in_pieces(values, work)

    def _spread(self, part: Part, maxima: NDArray[np.float32]) -> None:
        """Every rank's maxima, of the rows that it has seen, to all ranks."""
        own = self._communicator.rank
        others = [rank for rank in range(self._communicator.size) if rank != own]
        sends, receives = [], []
        for rank, rows in self._supply.seen(part):
            seen = maxima[rows.start : rows.stop]
            if rank != own:
                receives.append((rank, seen))
            else:
                sends += [(other, seen) for other in others]
        self._communicator.exchange(sends, receives)

    def _use_up(self, part: Part, binding: Binding, local: NDArray[Any], first: int, last: int) -> None:
        """Rows `first` to `last` of this rank's region have been looked at for the last time."""
        at = binding.weight.rows.start
        self._supply.use_up(part, Range(at + first, at + last), local[first:last])

    # Values that no weight can have

    def _refuse_not_finite(self, name: str, values: NDArray[Any]) -> None:
        if not self._all_finite(values):
            raise self._not_finite(name)

    def _all_finite(self, values: NDArray[Any]) -> bool:
        """Of floats as they are stored, (rows, columns), the columns of a row together."""
        if not values.size:
            return True
        # A column of numbers that lie together is one long row.
        rows = values.reshape(1, -1) if values.shape[1] == 1 and values.flags.c_contiguous else values
        assert rows.strides[1] == rows.itemsize

        def work(first: int, last: int) -> bool:
            address = rows[first:].ctypes.data
            dtype = _KERNEL_DTYPES[rows.dtype]
            return bool(kernels.all_finite(dtype, address, last - first, rows.shape[1], rows.strides[0]))

        return all(self._in_pieces(rows, work))

    def _not_finite(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint[name].file}: tensor {self._checkpoint[name].title} holds NaN or infinity; "
            f"weights must be finite, get the model anew"
        )

    def _in_pieces(self, values: NDArray[Any], work: Callable[[int, int], Any]) -> list[Any]:
        """`work(first, last)` over ranges of the rows of `values`, by all threads; the results in order."""
        rows = len(values)
        step = max(1, _PIECE_BYTES // (values.shape[1] * values.itemsize))
        pieces = [(first, min(first + step, rows)) for first in range(0, rows, step)]
        return list(self._pool.map(lambda piece: work(*piece), pieces))


def _unit_rows(local: NDArray[Any]) -> NDArray[np.float32]:
    """Rows divided by their lengths, float32."""
    out = np.empty(local.shape, np.float32)
    for first in range(0, len(local), _ROWS_AT_ONCE):
        values = floats.to_float32(local[first : first + _ROWS_AT_ONCE])
        lengths = np.sqrt(np.sum(np.square(values), axis=1, keepdims=True))
        out[first : first + _ROWS_AT_ONCE] = values / np.maximum(lengths, np.float32(1e-12))
    return out
