"""The block formats of GGUF files, dequantised to float32: the arithmetic of ggml, in its order, to the bit.

A row is a run of blocks of 32 or 256 weights. Each holds small integers and float16 factors; the types with a K share 8
factors of 6 bits, or 16, under one or two of float16. Own code, as reading weights is what this project is for; the
`gguf` package, which has the same in Python, is the oracle of its test.

Knows the layouts. Knows nothing of files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tpcpu.formats.floats import BFLOAT16, Array, to_float32

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Type:
    """How weights are stored: so many in a block of so many bytes."""

    name: str
    weights: int
    nbytes: int
    decode: Callable[[Bytes], Floats]  # (blocks, nbytes) to (blocks, weights)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(bytes_: Bytes) -> Bytes:
    """The low halves of the bytes, then the high ones."""
    return np.concatenate([bytes_ & 15, bytes_ >> 4], axis=1)


def _nibbles_by(bytes_: Bytes, run: int) -> Bytes:
    """The same, run after run of so many bytes."""
    runs = bytes_.reshape(len(bytes_), -1, 1, run)
    return (np.concatenate([runs & 15, runs >> 4], axis=2)).reshape(len(bytes_), -1)


def _bits(words: Bytes, count: int) -> Bytes:
    """The bits of bytes, lowest first, each as a byte, (blocks, count)."""
    return np.unpackbits(words, axis=1, bitorder="little")[:, :count]


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6], 32) << np.uint8(4)
    return _half(blocks, 0) * (codes.astype(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8], 32) << np.uint8(4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _six_bits(scales: Bytes) -> tuple[Floats, Floats]:
    """8 factors and 8 offsets of 6 bits out of 12 bytes, each (blocks, 8)."""
    first, second, high = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    factors = np.concatenate([first & 63, (high & 15) | (first >> 6) << np.uint8(4)], axis=1)
    offsets = np.concatenate([second & 63, (high >> 4) | (second >> 6) << np.uint8(4)], axis=1)
    return factors.astype(np.float32), offsets.astype(np.float32)


def _scaled(codes: Array, factors: Floats, offsets: Floats | None = None) -> Floats:
    """Codes times the factor, less the offset, of their runs, (blocks, runs)."""
    runs = codes.reshape(*factors.shape, -1).astype(np.float32)
    runs *= factors[:, :, None]
    if offsets is not None:
        runs -= offsets[:, :, None]
    return runs.reshape(len(codes), -1)


def _q4_k(blocks: Bytes) -> Floats:
    factors, offsets = _six_bits(blocks[:, 4:16])
    codes = _nibbles_by(blocks[:, 16:], 32)
    return _scaled(codes, _half(blocks, 0) * factors, _half(blocks, 2) * offsets)


def _q5_k(blocks: Bytes) -> Floats:
    factors, offsets = _six_bits(blocks[:, 4:16])
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    codes = _nibbles_by(blocks[:, 48:], 32) | high.reshape(len(blocks), -1) << np.uint8(4)
    return _scaled(codes, _half(blocks, 0) * factors, _half(blocks, 2) * offsets)


def _pairs(bytes_: Bytes, run: int) -> Bytes:
    """Two bits of each byte, lowest first, run after run of so many bytes."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    return (bytes_.reshape(len(bytes_), -1, 1, run) >> shifts & np.uint8(3)).reshape(len(bytes_), -1)


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles_by(blocks[:, :128], 64)
    codes = low | _pairs(blocks[:, 128:192], 32) << np.uint8(4)
    factors = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(codes.astype(np.int8) - np.int8(32), factors)


def _q2_k(blocks: Bytes) -> Floats:
    both = blocks[:, :16]
    factors = _half(blocks, 80) * (both & 15).astype(np.float32)
    offsets = _half(blocks, 82) * (both >> 4).astype(np.float32)
    return _scaled(_pairs(blocks[:, 16:80], 32), factors, offsets)


def _q3_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None] & np.uint8(3)).reshape(-1, 16)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    # a bit that is not set takes 4 away
    bits = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    less = (bits.reshape(len(blocks), -1) ^ np.uint8(1)) << np.uint8(2)
    codes = _pairs(blocks[:, 32:96], 32).astype(np.int8) - less.astype(np.int8)
    return _scaled(codes, _half(blocks, 108) * scales.astype(np.float32))


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _IQ4[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Bytes) -> Floats:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << np.uint8(4)).astype(np.int8) - np.int8(32)
    codes = _IQ4[_nibbles_by(blocks[:, 8:], 16)]
    return _scaled(codes, _half(blocks, 0) * scales.astype(np.float32))


def _floats(dtype: str) -> Callable[[Bytes], Floats]:
    return lambda blocks: to_float32(np.ascontiguousarray(blocks).view(BFLOAT16 if dtype == "bf16" else dtype))


TYPES = {
    0: Type("F32", 1, 4, _floats("<f4")),
    1: Type("F16", 1, 2, _floats("<f2")),
    2: Type("Q4_0", 32, 18, _q4_0),
    3: Type("Q4_1", 32, 20, _q4_1),
    6: Type("Q5_0", 32, 22, _q5_0),
    7: Type("Q5_1", 32, 24, _q5_1),
    8: Type("Q8_0", 32, 34, _q8_0),
    10: Type("Q2_K", 256, 84, _q2_k),
    11: Type("Q3_K", 256, 110, _q3_k),
    12: Type("Q4_K", 256, 144, _q4_k),
    13: Type("Q5_K", 256, 176, _q5_k),
    14: Type("Q6_K", 256, 210, _q6_k),
    20: Type("IQ4_NL", 32, 18, _iq4_nl),
    23: Type("IQ4_XS", 256, 136, _iq4_xs),
    30: Type("BF16", 1, 2, _floats("bf16")),
}
"""By ggml's numbers."""

BY_NAME = {each.name: each for each in TYPES.values()}


def dequantize(name: str, rows: Bytes) -> Floats:
    """Rows of bytes, (rows, bytes of a row), as (rows, columns) float32."""
    kind = BY_NAME[name]
    return kind.decode(rows.reshape(-1, kind.nbytes)).reshape(len(rows), -1)
