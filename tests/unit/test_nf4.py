"""NF4 against bitsandbytes: what it quantised we read to the bit, and given its offset we quantise to its bytes."""

import json

import numpy as np
import pytest

from tpcpu.errors import CheckpointError
from tpcpu.formats import nf4
from tpcpu.formats.floats import FLOATS, convert
from tpcpu.formats.tables import DYNAMIC_MAP, NF4_CODE

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")
oracle = pytest.importorskip("tests.bitsandbytes_oracle")


def torch_of(values):
    if values.dtype == FLOATS["bfloat16"]:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def awkward_tensors():
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((256, 512)).astype(np.float32)
    yield "normal", normal
    yield "small", normal * np.float32(0.02)
    yield "several groups", rng.standard_normal((96, 1408)).astype(np.float32)
    yield "7x33", rng.standard_normal((7, 33)).astype(np.float32)
    yield "101x101", rng.standard_normal((101, 101)).astype(np.float32)
    tail = rng.standard_normal((65, 65)).astype(np.float32)
    tail.reshape(-1)[-1:] = 0
    yield "zero tail", tail
    yield "one value", np.array([[0.3]], np.float32)
    zeros = normal[:64].copy()
    zeros[::3, 64:192] = 0
    yield "zero blocks", zeros
    yield "all zero", np.zeros((8, 64), np.float32)
    yield "constant", np.full((64, 64), 0.25, np.float32)
    yield "convolution", rng.standard_normal((32, 64, 2, 1)).astype(np.float32)
    yield "denormals", (rng.standard_normal((32, 64)) * 1e-39).astype(np.float32)
    yield "mixed magnitudes", (normal * 10.0 ** rng.integers(-30, 4, (256, 1))).astype(np.float32)
    middles = np.zeros((4, 64), np.float32)
    middles[:, 0] = 1
    middles[:, 1:16] = (NF4_CODE[:-1] + NF4_CODE[1:]) * np.float32(0.5)
    yield "exact middles", middles
    yield "257 blocks", rng.standard_normal((257, 64)).astype(np.float32)
    yield "257 equal blocks", np.tile(rng.standard_normal(64).astype(np.float32), (257, 1))


CASES = [
    pytest.param(convert(values, dtype), id=f"{name}-{dtype}")
    for name, values in awkward_tensors()
    for dtype in FLOATS
    if not (name == "mixed magnitudes" and dtype == "float16")
]


@pytest.mark.parametrize("values", CASES)
def test_bytes_of_bitsandbytes_given_its_offset(values):
    packed, state = bnb.quantize_4bit(torch_of(values), quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(values, offset=np.float32(state.offset.item()))
    assert np.array_equal(ours.codes, packed.numpy().reshape(-1))
    assert np.array_equal(ours.nested_absmax, state.state2.absmax.numpy())
    assert np.array_equal(ours.absmax, state.absmax.numpy())
    assert abs(nf4.quantize(values).offset - ours.offset) <= 4 * np.spacing(np.abs(ours.offset))


@pytest.mark.parametrize("values", CASES)
@pytest.mark.parametrize("nested", [True, False])
def test_values_of_bitsandbytes_tensors(values, nested):
    ours, theirs = read_and_dequantised(torch_of(values).float(), compress_statistics=nested)
    assert ours.nested == nested
    assert np.array_equal(nf4.dequantize(ours).view(np.uint32), theirs.view(np.uint32))


def read_and_dequantised(values, **settings):
    """What bitsandbytes makes of `values`: as we read it, and dequantised by its own functions."""
    packed, state = bnb.quantize_4bit(values, **{"quant_type": "nf4"} | settings)
    stored = {"w.weight": packed.numpy()}
    stored |= {f"w.weight.{key}": part.numpy() for key, part in state.as_dict(packed=True).items()}
    ours = nf4.from_tensors("w.weight", stored.__getitem__, stored)
    return ours, oracle.dequantised(packed, state).numpy()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_other_kinds_and_block_sizes(kind, block, nested):
    """The last block is short; groups of scales end inside the tensor."""
    values = torch.randn(300, 320, generator=torch.Generator().manual_seed(block))
    ours, theirs = read_and_dequantised(values, quant_type=kind, blocksize=block, compress_statistics=nested)
    assert (ours.kind, ours.nested, ours.block) == (kind, nested, min(block, 64))
    assert ours.absmax.size == -(-values.numel() // ours.block)
    assert np.array_equal(nf4.dequantize(ours), theirs)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (7, 33), (16, 32, 2, 1)])
def test_bitsandbytes_reads_what_we_write(shape, nested):
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    ours = nf4.quantize(values, nested=nested)
    parts = {key: torch.from_numpy(np.array(part)) for key, part in nf4.to_tensors("w.weight", ours).items()}
    packed = parts.pop("w.weight")
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    theirs = oracle.dequantised(packed, state).numpy()
    assert theirs.shape == shape
    assert np.array_equal(nf4.dequantize(ours).view(np.uint32), theirs.view(np.uint32))


def test_names_and_order_of_parts():
    values = torch.randn(64, 128)
    packed, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    theirs = {"w": packed} | {f"w.{key}": part for key, part in state.as_dict(packed=True).items()}
    ours = nf4.to_tensors("w", nf4.quantize(values.numpy(), offset=np.float32(state.offset.item())))
    assert sorted(ours) == sorted(theirs)
    for key, part in theirs.items():
        assert np.array_equal(ours[key], part.numpy()), key
    assert bytes(ours["w.quant_state.bitsandbytes__nf4"]) == bytes(theirs["w.quant_state.bitsandbytes__nf4"].numpy())


def test_tables():
    assert np.array_equal(DYNAMIC_MAP, bnb.create_dynamic_map().numpy())
    for kind, code in nf4.CODES.items():
        assert np.array_equal(code, bnb.get_4bit_type(kind, device="cpu").numpy())


def test_offset_is_summed_in_float64():
    maxima = np.full(1 << 20, 0.1, np.float32)
    assert nf4.scale_offset(maxima) == np.float32(0.1)


def stored_tensor():
    return nf4.to_tensors("w.weight", nf4.quantize(np.ones((4, 64), np.float32)))


def with_state(**changes):
    parts = stored_tensor()
    key = f"w.weight.{nf4.STATE_KEY}"
    state = json.loads(bytes(parts[key])) | changes
    return parts | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


BROKEN = {
    "absent": ({"w.weight": np.zeros(4, np.uint8)}, "not stored in 4 bits"),
    "two states": (stored_tensor() | {f"w.weight.{nf4.STATE_KEYS['fp4']}": np.zeros(4, np.uint8)}, "two of them"),
    "block size": (with_state(blocksize=96), "blocksize is 96"),
    "larger blocks": (with_state(blocksize=128), "found 4 values of uint8, expected 2"),
    "block size of another type": (with_state(blocksize=64.0), "blocksize is 64.0"),
    "values of a code": (stored_tensor() | {"w.weight.quant_map": np.zeros(16, np.float32)}, "the 16 values of NF4"),
    "shape": (with_state(shape=[-1, 3]), "shape is"),
    "shape too large": (with_state(shape=[1 << 40, 1 << 40]), "4-bit codes, found 128"),
    "dtype": (with_state(dtype="float8"), "dtype is 'float8'"),
    "offset": (with_state(nested_offset=float("nan")), "nested_offset is nan"),
    "other kind": (with_state(quant_type="fp4"), "quant_type is 'fp4'"),
    "not JSON": (stored_tensor() | {f"w.weight.{nf4.STATE_KEY}": np.frombuffer(b"{", np.uint8)}, "not JSON"),
    "deep JSON": (stored_tensor() | {f"w.weight.{nf4.STATE_KEY}": np.frombuffer(b"[" * 4000, np.uint8)}, "not JSON"),
    "a list": (stored_tensor() | {f"w.weight.{nf4.STATE_KEY}": np.frombuffer(b"[]", np.uint8)}, "not a JSON object"),
    "long": (stored_tensor() | {f"w.weight.{nf4.STATE_KEY}": np.zeros(9999, np.uint8)}, "short JSON"),
    "scales": (stored_tensor() | {"w.weight.absmax": np.zeros(3, np.uint8)}, "found 3 values of uint8, expected 4"),
    "scale dtype": (stored_tensor() | {"w.weight.absmax": np.zeros(4, np.float32)}, "expected 4 of uint8"),
    "part": ({k: v for k, v in stored_tensor().items() if not k.endswith("nested_absmax")}, "is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_named(case):
    parts, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message) as error:
        nf4.from_tensors("w.weight", parts.__getitem__, parts)
    assert "w.weight" in str(error.value)


def test_other_dtypes_are_refused():
    with pytest.raises(CheckpointError, match="float64"):
        nf4.quantize(np.ones((1, 64)))
