"""Tensors converted in pieces by all cores, from the pages of one file to places in another.

Each piece gives back its pages when it is done, so that no more than one tensor is ever in memory. Knows formats and
threads. Knows nothing of models.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

from tpcpu.checkpoint import Checkpoint, WeightsWriter
from tpcpu.errors import CheckpointError
from tpcpu.formats import floats, int8, nf4
from tpcpu.formats.tables import DYNAMIC_MAP, NEAREST_CODE, NF4_CODE
from tpcpu.kernels import quantize as kernels
from tpcpu.quantize.plan import Treatment
from tpcpu.quantize.values import DTYPE_NAMES, Values, values_of

BLOCK = kernels.BLOCK

_KERNEL_DTYPES = {"bfloat16": kernels.BF16, "float16": kernels.F16, "float32": kernels.F32}


class Converter:
    """Converts one tensor at a time, in pieces, on all cores."""

    def __init__(self, checkpoint: Checkpoint, jobs: int | None) -> None:
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)), "quantize")
        self._buffers = threading.local()

    def __enter__(self) -> "Converter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def convert(self, treatment: Treatment, weights: WeightsWriter, advance: Callable[[int], None]) -> None:
        """Convert and write the tensor; `advance` is told the bytes of source done, piece after piece.

        No thread is at work any more when this returns or raises.
        """
        name = treatment.source.name
        values = values_of(self._checkpoint, treatment.source)
        dtype = values.dtype
        match treatment.into:
            case "nf4":
                maxima = self._maxima(name, values)
                self._write_nf4_scales(treatment, maxima, weights)
                self._run(values, lambda start, piece: self._nf4(name, dtype, start, piece, maxima, weights), advance)
            case "int8":
                maxima = self._maxima(name, values)
                self._run(values, lambda start, piece: self._int8(name, dtype, start, piece, maxima, weights), advance)
                weights.write(int8.scale_name(name), maxima)
            case into:
                self._run(values, lambda start, piece: self._float(name, dtype, into, start, piece, weights), advance)
        self._checkpoint.release(name)

    def _run(
        self,
        values: Values,
        work: Callable[[int, floats.Array], None],
        advance: Callable[[int], None] | None,
    ) -> None:
        """`work(start, piece)` for all pieces, on all cores; without `advance` they are needed once more."""

        def one(start: int) -> int:
            work(start, values.piece(start))
            if advance is not None:
                values.release(start)
            return values.stored_bytes(start)

        pieces = [self._pool.submit(one, start) for start in range(0, values.size, values.step)]
        try:
            for piece in pieces:
                nbytes = piece.result()
                if advance is not None:
                    advance(nbytes)
        finally:  # after a fault, or Ctrl-C: what is at work still uses the files, which are about to be closed
            for piece in pieces:
                piece.cancel()
            wait(pieces)

    def _maxima(self, name: str, values: Values) -> npt.NDArray[np.float32]:
        maxima = np.empty(values.size // BLOCK, np.float32)

        def work(start: int, piece: floats.Array) -> None:
            self._check(name, values.dtype, start, piece, maxima[start // BLOCK : (start + piece.size) // BLOCK])

        self._run(values, work, None)
        return maxima

    def _check(self, name: str, dtype: str, start: int, piece: floats.Array, maxima: npt.NDArray[np.float32]) -> None:
        """Block maxima of a piece of whole blocks; refuses NaN and infinity by name and place."""
        bad = kernels.block_maxima(_KERNEL_DTYPES[dtype], piece.ctypes.data, 1, maxima.size, 0, maxima.ctypes.data, 0)
        if bad >= 0:
            self._refuse(name, start + bad * BLOCK, piece[bad * BLOCK :])

    def _refuse(self, name: str, start: int, values: floats.Array) -> None:
        wide = floats.to_float32(values[:BLOCK])
        place = int(np.argmin(np.isfinite(wide)))
        tensor = self._checkpoint[name]
        index = [int(i) for i in np.unravel_index(start + place, tensor.shape)]
        raise CheckpointError(
            f"{tensor.file}: tensor {name} holds {wide[place]} at {index}; weights must be finite, get the model anew"
        )

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Room of this thread."""
        room: npt.NDArray[np.uint8] | None = getattr(self._buffers, "room", None)
        if room is None or room.size < nbytes:
            room = self._buffers.room = np.empty(nbytes, np.uint8)
        return room[:nbytes]

    def _nf4(
        self,
        name: str,
        dtype: str,
        start: int,
        piece: floats.Array,
        maxima: npt.NDArray[np.float32],
        weights: WeightsWriter,
    ) -> None:
        own, codes = maxima[start // BLOCK :], self._buffer(piece.size // 2)
        blocks = piece.size // BLOCK
        kernels.nf4_codes(
            _KERNEL_DTYPES[dtype], piece.ctypes.data, 1, blocks, 0, own.ctypes.data, 0, codes.ctypes.data, 0
        )
        weights.write(name, codes, start // 2)

    def _write_nf4_scales(self, treatment: Treatment, maxima: npt.NDArray[np.float32], weights: WeightsWriter) -> None:
        name, dtype = treatment.source.name, DTYPE_NAMES[treatment.source.dtype]
        offset = nf4.scale_offset(maxima)
        codes, groups = np.empty(maxima.size, np.uint8), np.empty(-(-maxima.size // nf4.GROUP), np.float32)
        kernels.nf4_scale_codes(
            maxima.ctypes.data,
            maxima.size,
            offset,
            NEAREST_CODE.ctypes.data,
            codes.ctypes.data,
            groups.ctypes.data,
        )
        weights.write(f"{name}.absmax", codes)
        weights.write(f"{name}.nested_absmax", groups)
        weights.write(f"{name}.nested_quant_map", DYNAMIC_MAP)
        weights.write(f"{name}.quant_map", NF4_CODE)
        weights.write_late(f"{name}.{nf4.STATE_KEY}", nf4.pack_state(treatment.source.shape, dtype, offset))

    def _int8(
        self,
        name: str,
        dtype: str,
        start: int,
        piece: floats.Array,
        maxima: npt.NDArray[np.float32],
        weights: WeightsWriter,
    ) -> None:
        own, values = maxima[start // BLOCK :], self._buffer(piece.size)
        blocks, scales = piece.size // BLOCK, own.ctypes.data  # the scales take the place of the maxima
        kernels.int8_values(
            _KERNEL_DTYPES[dtype], piece.ctypes.data, 1, blocks, 0, scales, 0, values.ctypes.data, 0, scales, 0
        )
        weights.write(name, values, start)

    def _float(self, name: str, dtype: str, into: str, start: int, piece: floats.Array, weights: WeightsWriter) -> None:
        full = piece.size // BLOCK * BLOCK
        self._check(name, dtype, start, piece[:full], np.empty(full // BLOCK, np.float32))
        if not np.isfinite(floats.to_float32(piece[full:])).all():
            self._refuse(name, start + full, piece[full:])
        converted = floats.convert(piece, into)
        if dtype != into != "float32" and not np.isfinite(floats.to_float32(converted)).all():
            raise CheckpointError(f"tensor {name} holds values beyond the range of {into}; use --format float32")
        weights.write(name, converted, start * converted.itemsize)
