"""4-bit folders as transformers and bitsandbytes write them, served as they are."""

import json
import shutil

import numpy as np
import pytest

from tests.models.test_compiled import TURNED, running
from tests.models.tiny import DATA
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli.description import describe
from tpcpu.formats import floats, nf4

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")
oracle = pytest.importorskip("tests.bitsandbytes_oracle")
transformers = pytest.importorskip("transformers")
load_file, save_file = (getattr(pytest.importorskip("safetensors.torch"), f"{verb}_file") for verb in ("load", "save"))

MODEL = DATA / "llama-tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IDS = [1, 17, 300, 45, 9, 201, 77, 5, 123, 88, 400, 31]

CASES = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4-stored-as-bfloat16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder and the weights of a case, dequantised by bitsandbytes, by name."""
    made = {}

    def write(case, dtype="float32"):
        if (case, dtype) not in made:
            folder = tmp_path_factory.mktemp(case)
            config = transformers.BitsAndBytesConfig(load_in_4bit=True, **CASES[case])
            model = transformers.LlamaForCausalLM.from_pretrained(
                MODEL, quantization_config=config, dtype=DTYPES[dtype], device_map="cpu"
            )
            model.save_pretrained(folder)
            made[case, dtype] = folder, {name: _dequantised(value) for name, value in model.named_parameters()}
        return made[case, dtype]

    return write


def _dequantised(parameter):
    state = getattr(parameter, "quant_state", None)
    return parameter.detach() if state is None else oracle.dequantised(parameter.data, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_weight_has_the_bits_of_bitsandbytes(written, case, dtype):
    folder, weights = written(case, dtype)
    with Checkpoint.open(folder) as checkpoint:
        stored = [name for name in weights if nf4.is_stored(name, checkpoint.tensors)]
        assert len(stored) == 7 * json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        for name in stored:
            tensor = nf4.from_tensors(name, checkpoint.array, checkpoint.tensors)
            assert (tensor.kind, tensor.nested) == (case[:3], case.endswith("double"))
            ours = floats.to_float32(floats.convert(nf4.dequantize(tensor), dtype))
            theirs = weights[name].float().numpy()
            assert np.array_equal(ours, theirs), name


def torch_logits(weights):
    config = transformers.LlamaConfig.from_pretrained(MODEL, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict(weights)
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].numpy()


def logits(folder, **options):
    with running(folder, lm_head="bf16", **options) as runner:
        return runner.logits(IDS, wanted=list(range(len(IDS))))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_torch_over_the_same_weights(written, case):
    folder, weights = written(case)
    assert np.abs(logits(folder, exact=True) - torch_logits(weights)).max() < 1e-3


def test_fp4_in_everyday_arithmetic(written):
    folder, weights = written("fp4-double")
    differences = np.abs(logits(folder) - torch_logits(weights))
    assert differences.max() < TURNED
    assert differences.mean() < TURNED / 10


@pytest.mark.parametrize(("block", "nested"), [(32, True), (128, False), (256, True)])
def test_other_block_sizes(tmp_path, block, nested):
    """Which transformers does not write, but reads, and other software writes."""
    weights, stored = load_file(MODEL / "model.safetensors"), {}
    for name, values in weights.items():
        weights[name] = values.float()
        stored[name] = values
        if "_proj" in name:
            packed, state = bnb.quantize_4bit(
                values.float(), quant_type="nf4", blocksize=block, compress_statistics=nested
            )
            weights[name] = oracle.dequantised(packed, state)
            stored |= {name: packed} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(stored, tmp_path / "model.safetensors")
    shutil.copy(MODEL / "config.json", tmp_path)
    assert np.abs(logits(tmp_path, exact=True) - torch_logits(weights)).max() < 1e-3
    with Checkpoint.open(tmp_path) as checkpoint:
        found = describe(checkpoint)
    assert not found.unsupported
    assert any(f"blocks of {block}" in form for form in found.bytes_by_format)
    assert bool(found.not_quantized) == (block == 32)
