"""Compiled quantising: block maxima, NF4 codes, scale codes, int8 values.

Plain loops that LLVM vectorises; no SIMD types, so one text serves every instruction set. The specification is
`formats/nf4.py` and `formats/int8.py`, and the bits are the same.

Everything works on a *region*: `rows` rows of `blocks` whole blocks of 64 values, `stride` bytes from row to row in the
source. A contiguous tensor is one row; a column slice of a matrix is many. What belongs to blocks (maxima, scales) and
to values (codes) has strides of its own, in bytes, so that a slice may read and write inside larger arrays. Two stages,
because the scales of a tensor depend on all of it:

1. `block_maxima` (also finds NaN and infinity);
2. `nf4_codes` and `nf4_scale_codes`, or `int8_values`.

Knows addresses, sizes and the three float formats. Knows nothing of tensors, files, ranks or threads. Callers keep the
memory alive; nothing here allocates, and every function runs without the interpreter lock.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from tpcpu.kernels.compile import function

njit: Any = numba.njit  # numba describes some of its types, and mypy does not agree with how these are used
intrinsic: Any = numba_intrinsic

BF16 = 0
F16 = 1
F32 = 2

BLOCK = 64
GROUP = 256

_SMALLEST = np.float32(1e-38)

_INLINED = {
    "forceinline": True,
    "boundscheck": False,
    "error_model": "numpy",
}  # compiled into the functions that call them


def _pointer(value_type):
    """An intrinsic that takes an address for a pointer to `value_type`."""

    @intrinsic
    def pointer(_typing, _address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(value_type)(types.int64), generate

    return pointer


_u8 = _pointer(types.uint8)
_i8 = _pointer(types.int8)
_u16 = _pointer(types.uint16)
_u32 = _pointer(types.uint32)
_f32 = _pointer(types.float32)


@intrinsic
def _as_float(_typing, _bits):  # the float32 with these bits
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _block_room(_typing):  # the address of room for 64 float32 and 64 bytes, on the stack
    def generate(_context, builder, _signature, _arguments):
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), 5 * BLOCK))
        room.align = 64
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(), generate


@njit(**_INLINED)
def _from_half(bits):
    # shifted into place, a half is a float32 with an exponent too small by 112: exact for denormals too
    magnitude = _as_float(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    return -magnitude if bits & np.uint16(0x8000) else magnitude


@njit(**_INLINED)
def _widen(dtype, source, block):
    """64 values at `source` as float32 at `block`."""
    out = _f32(block)
    if dtype == BF16:
        brain = _u16(source)
        for i in range(BLOCK):
            out[i] = _as_float(np.uint32(brain[i]) << np.uint32(16))
    elif dtype == F16:
        half = _u16(source)
        for i in range(BLOCK):
            out[i] = _from_half(half[i])
    else:
        single = _f32(source)
        for i in range(BLOCK):
            out[i] = single[i]


@function(types.int64(*[types.int64] * 7))
def block_maxima(dtype, source, rows, blocks, stride, maxima, maxima_stride):
    """Largest magnitude of each block, float32, to `maxima`.

    Returns the number (row × blocks + block) of the first block that holds a NaN or an infinity, or -1.
    """
    worst = np.int64(-1)
    item = 4 if dtype == F32 else 2
    for row in range(rows):
        out = _f32(maxima + row * maxima_stride)
        for block in range(blocks):
            address = source + row * stride + block * BLOCK * item
            # magnitudes of floats are ordered as their bits are; integers have vector maxima that floats, with NaN,
            # lack
            if dtype == F32:
                single = _u32(address)
                high = np.uint32(0)
                for i in range(BLOCK):
                    high = max(high, single[i] & np.uint32(0x7FFFFFFF))
                largest = _as_float(high)
                finite = high < np.uint32(0x7F800000)
            else:
                short = _u16(address)
                top = np.uint16(0)
                for i in range(BLOCK):
                    top = max(top, np.uint16(short[i] & np.uint16(0x7FFF)))
                if dtype == BF16:
                    largest = _as_float(np.uint32(top) << np.uint32(16))
                    finite = top < np.uint16(0x7F80)
                else:
                    largest = _from_half(top)
                    finite = top < np.uint16(0x7C00)
            out[block] = largest
            if not finite and worst < 0:
                worst = row * blocks + block
    return worst


@function(types.boolean(*[types.int64] * 5))
def all_finite(dtype, source, rows, columns, stride):
    """Whether no value of a region is NaN or infinity; `columns` of any number, `stride` bytes from row to row."""
    for row in range(rows):
        if dtype == F32:
            single = _u32(source + row * stride)
            high = np.uint32(0)
            for i in range(columns):
                high = max(high, single[i] & np.uint32(0x7FFFFFFF))
            finite = high < np.uint32(0x7F800000)
        else:
            short = _u16(source + row * stride)
            top = np.uint16(0)
            for i in range(columns):
                top = max(top, np.uint16(short[i] & np.uint16(0x7FFF)))
            finite = top < np.uint16(0x7F80 if dtype == BF16 else 0x7C00)
        if not finite:
            return False
    return True


@njit(**_INLINED)
def _nf4_code(x):
    # The number of decision points below x. Written out: LLVM vectorises this, but not a search in a table.
    code = np.uint32(x > np.float32(-0.8480963706970215))
    code += np.uint32(x > np.float32(-0.6106328964233398))
    code += np.uint32(x > np.float32(-0.4599952697753906))
    code += np.uint32(x > np.float32(-0.33967941999435425))
    code += np.uint32(x > np.float32(-0.23460739850997925))
    code += np.uint32(x > np.float32(-0.13791173696517944))
    code += np.uint32(x > np.float32(-0.045525018125772476))
    code += np.uint32(x > np.float32(0.03979014977812767))
    code += np.uint32(x > np.float32(0.120255246758461))
    code += np.uint32(x > np.float32(0.2035212516784668))
    code += np.uint32(x > np.float32(0.2920137643814087))
    code += np.uint32(x > np.float32(0.3893125355243683))
    code += np.uint32(x > np.float32(0.5016634464263916))
    code += np.uint32(x > np.float32(0.6427869200706482))
    code += np.uint32(x > np.float32(0.8614784479141235))
    return np.uint8(code)


@function(types.void(*[types.int64] * 9))
def nf4_codes(dtype, source, rows, blocks, stride, maxima, maxima_stride, codes, codes_stride):
    """Packed NF4 codes, 32 bytes a block, to `codes`, given the block maxima."""
    item = 4 if dtype == F32 else 2
    wide = _block_room()
    narrow = wide + BLOCK * 4
    x = _f32(wide)
    single = _u8(narrow)
    pair = _u16(narrow)
    for row in range(rows):
        largest = _f32(maxima + row * maxima_stride)
        for block in range(blocks):
            _widen(dtype, source + row * stride + block * BLOCK * item, wide)
            inverse = np.float32(1) / max(largest[block], _SMALLEST)
            for i in range(BLOCK):
                single[i] = _nf4_code(x[i] * inverse)
            out = _u8(codes + row * codes_stride + block * (BLOCK // 2))
            for i in range(
                BLOCK // 2
            ):  # little-endian: the first of two codes is the low byte, and goes to the high nibble
                out[i] = np.uint8((pair[i] << np.uint16(4)) | (pair[i] >> np.uint16(8)))


@function(types.void(types.int64, types.int64, types.float32, types.int64, types.int64, types.int64))
def nf4_scale_codes(maxima, blocks, offset, nearest, codes, groups):
    """8-bit codes of the scales of `blocks` blocks, counted from the start of a group, and the float32 scale of each
    group.

    `nearest` is the address of the 65536 codes of `formats.tables.NEAREST_CODE`. The last group may be short.
    """
    largest = _f32(maxima)
    table = _u8(nearest)
    out = _u8(codes)
    scale = _f32(groups)
    for group in range((blocks + GROUP - 1) // GROUP):
        start, stop = group * GROUP, min(group * GROUP + GROUP, blocks)
        high = np.float32(0)
        for block in range(start, stop):
            high = max(high, abs(largest[block] - offset))
        scale[group] = high
        inverse = np.float32(1) / high
        for block in range(start, stop):
            relative = (largest[block] - offset) * inverse
            if relative != relative:  # 0 × infinity, in a group of equal scales
                out[block] = 0
            else:
                relative = min(max(relative, np.float32(-1)), np.float32(1))
                out[block] = table[np.int64((relative + np.float32(1)) * np.float32(32767.5) + np.float32(0.5))]


@function(types.void(*[types.int64] * 11))
def int8_values(
    dtype, source, rows, blocks, stride, maxima, maxima_stride, values, values_stride, scales, scales_stride
):
    """int8 values, 64 bytes a block, and float32 scales, given the block maxima (`scales` may be the same memory)."""
    item = 4 if dtype == F32 else 2
    # adding and taking away 1.5 × 2^23 rounds to an integer, ties to even, on every instruction set
    shift, limit = np.float32(12582912), np.float32(127)
    wide = _block_room()
    x = _f32(wide)
    for row in range(rows):
        largest = _f32(maxima + row * maxima_stride)
        scale_of = _f32(scales + row * scales_stride)
        for block in range(blocks):
            _widen(dtype, source + row * stride + block * BLOCK * item, wide)
            scale = largest[block] / limit
            scale_of[block] = scale
            divisor = scale if scale > 0 else np.float32(np.inf)
            out = _i8(values + row * values_stride + block * BLOCK)
            for i in range(BLOCK):
                clipped = min(max(x[i] / divisor, -limit), limit)
                out[i] = np.int8(np.int32((clipped + shift) - shift))
