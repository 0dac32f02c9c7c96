"""The compiled quantiser against its specification in numpy: the same bits, on whole tensors and on slices of them."""

import numpy as np
import pytest

from tpcpu.formats import int8, nf4
from tpcpu.formats.floats import FLOATS, convert
from tpcpu.formats.tables import NEAREST_CODE, NF4_MIDPOINTS
from tpcpu.kernels import quantize as kernels

CODES = {"bfloat16": kernels.BF16, "float16": kernels.F16, "float32": kernels.F32}


def block_maxima(values, dtype):
    maxima = np.full(values.size // 64, np.nan, np.float32)
    bad = kernels.block_maxima(CODES[dtype], values.ctypes.data, 1, maxima.size, 0, maxima.ctypes.data, 0)
    return maxima, bad


def matrices():
    rng = np.random.default_rng(3)
    normal = rng.standard_normal((96, 192)).astype(np.float32)
    yield "normal", normal
    yield "one block", normal[:1, :64]
    yield "no blocks", normal[:0]
    yield "zero", np.zeros((4, 64), np.float32)
    some = normal.copy()
    some[::2, 64:128] = 0
    yield "zero blocks", some
    yield "denormals", (normal * 1e-39).astype(np.float32)
    yield "half denormals", (normal * 1e-6).astype(np.float32)
    yield "large", (normal * 1e4).astype(np.float32)
    yield "identity", np.eye(128, dtype=np.float32)
    middles = np.ones((3, 64), np.float32)
    around = [np.nextafter(NF4_MIDPOINTS, -2), NF4_MIDPOINTS, np.nextafter(NF4_MIDPOINTS, 2)]
    for row, values in enumerate(around):
        middles[row, 1:16] = values
    yield "beside each middle", middles
    yield "constant", np.full((257, 64), 0.5, np.float32)


CASES = [pytest.param(convert(m, d), d, id=f"{name}-{d}") for name, m in matrices() for d in FLOATS]


@pytest.mark.parametrize(("values", "dtype"), CASES)
def test_nf4(values, dtype):
    expected = nf4.quantize(values)
    maxima, bad = block_maxima(values, dtype)
    assert bad == -1
    assert np.array_equal(maxima, nf4.block_maxima(values))
    codes = np.zeros(values.size // 2, np.uint8)
    kernels.nf4_codes(CODES[dtype], values.ctypes.data, 1, maxima.size, 0, maxima.ctypes.data, 0, codes.ctypes.data, 0)
    assert np.array_equal(codes, expected.codes)
    scale_codes = np.full(maxima.size, 99, np.uint8)
    groups = np.zeros(-(-maxima.size // 256), np.float32)
    kernels.nf4_scale_codes(
        maxima.ctypes.data,
        maxima.size,
        expected.offset,
        NEAREST_CODE.ctypes.data,
        scale_codes.ctypes.data,
        groups.ctypes.data,
    )
    assert np.array_equal(scale_codes, expected.absmax)
    assert np.array_equal(groups, expected.nested_absmax)


@pytest.mark.parametrize(("values", "dtype"), CASES)
def test_int8(values, dtype):
    expected = int8.quantize(values)
    maxima, _ = block_maxima(values, dtype)
    out = np.zeros(values.shape, np.int8)
    scales = maxima.ctypes.data  # the scales may take the place of the maxima
    kernels.int8_values(
        CODES[dtype], values.ctypes.data, 1, maxima.size, 0, maxima.ctypes.data, 0, out.ctypes.data, 0, scales, 0
    )
    assert np.array_equal(out, expected.values)
    assert np.array_equal(maxima.view(np.uint32), expected.scales.reshape(-1).view(np.uint32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_over_many_groups(dtype):
    values = convert(np.random.default_rng(5).standard_normal((700, 64)).astype(np.float32), dtype)
    expected = nf4.quantize(values)
    maxima, _ = block_maxima(values, dtype)
    codes, groups = np.zeros(700, np.uint8), np.zeros(3, np.float32)
    addresses = (NEAREST_CODE.ctypes.data, codes.ctypes.data, groups.ctypes.data)
    kernels.nf4_scale_codes(maxima.ctypes.data, 700, expected.offset, *addresses)
    assert np.array_equal(codes, expected.absmax)
    assert np.array_equal(groups, expected.nested_absmax)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_slice_of_columns_gets_the_codes_of_the_whole(dtype):
    values = convert(np.random.default_rng(4).standard_normal((40, 512)).astype(np.float32), dtype)
    whole = nf4.quantize(values)
    item = values.itemsize
    first, blocks = 3, 4
    source = values.ctypes.data + first * 64 * item
    maxima = np.zeros((40, blocks), np.float32)
    kernels.block_maxima(CODES[dtype], source, 40, blocks, 512 * item, maxima.ctypes.data, 4 * blocks)
    assert np.array_equal(maxima, nf4.block_maxima(values).reshape(40, 8)[:, first : first + blocks])
    codes = np.zeros((40, 256), np.uint8)  # written in place, inside the rows of the whole
    kernels.nf4_codes(
        CODES[dtype],
        source,
        40,
        blocks,
        512 * item,
        maxima.ctypes.data,
        4 * blocks,
        codes.ctypes.data + first * 32,
        256,
    )
    expected = np.zeros_like(codes)
    span = slice(first * 32, (first + blocks) * 32)
    expected[:, span] = whole.codes.reshape(40, 256)[:, span]
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_first_block_that_is_not_finite_is_found(dtype, bad):
    values = np.ones((8, 128), np.float32)
    values[3, 70] = values[6, 5] = bad
    _, found = block_maxima(convert(values, dtype), dtype)
    assert found == 3 * 2 + 1


@pytest.mark.parametrize("largest", [65504.0, -65504.0])
def test_the_largest_half_is_finite(largest):
    values = np.full((1, 64), largest, np.float16)
    maxima, found = block_maxima(values, "float16")
    assert found == -1
    assert maxima[0] == 65504
