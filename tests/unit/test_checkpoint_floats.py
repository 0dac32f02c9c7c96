"""Conversions between float formats are those of ml_dtypes and numpy, NaN and denormals included."""

import ml_dtypes
import numpy as np
import pytest

from tpcpu.formats.floats import FLOATS, convert, is_float


def every_half(dtype):
    return np.arange(65536, dtype=np.uint32).astype(np.uint16).view(dtype)


def same(ours, theirs):
    nan = np.isnan(theirs.astype(np.float32))
    assert np.array_equal(np.isnan(ours.astype(np.float32)), nan)
    assert np.array_equal(ours[~nan].view(np.uint8), theirs[~nan].view(np.uint8))


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("given", ["bfloat16", "float16"])
def test_every_16_bit_value(given, wanted):
    values = every_half(FLOATS[given])
    with np.errstate(over="ignore", invalid="ignore"):
        same(convert(values, wanted), values.astype(np.float32).astype(FLOATS[wanted]))


@pytest.mark.parametrize("wanted", ["bfloat16", "float16"])
def test_rounding_of_float32(wanted):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 17, dtype=np.uint64).astype(np.uint32)
    bits[:65536] = (bits[:65536] & 0xFFFF0000) | 0x8000  # ties
    values = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        same(convert(values, wanted), values.astype(FLOATS[wanted]))


def test_nothing_to_do_copies_nothing():
    values = np.zeros(3, ml_dtypes.bfloat16)
    assert convert(values, "bfloat16") is values
    assert is_float(values.dtype)
    assert not is_float(np.dtype(np.float64))
