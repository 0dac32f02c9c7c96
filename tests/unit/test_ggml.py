"""Every block format of GGUF against the dequantiser of the `gguf` package, to the bit, on random bytes."""

import numpy as np
import pytest

from tpcpu.formats import ggml

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", ggml.BY_NAME)
def test_bits_of_the_gguf_package(name):
    """Also of what no quantiser writes: any bytes are values, factors of infinity and NaN aside."""
    kind = ggml.BY_NAME[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert (kind.weights, kind.nbytes) == gguf.GGML_QUANT_SIZES[theirs]
    blocks = 512 // kind.weights
    rows = np.random.default_rng(0).integers(0, 256, (64, blocks * kind.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, theirs)
        found = ggml.dequantize(name, rows)
    assert found.shape == expected.shape == (64, 512)
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.view(np.uint32)[numbers], expected.astype(np.float32).view(np.uint32)[numbers])
    assert np.isnan(found[~numbers]).all()
    assert numbers.mean() > 0.5
