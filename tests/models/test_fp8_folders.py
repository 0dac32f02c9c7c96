"""Folders of fp8 weights: served, and quantised from, as the bfloat16 weights that transformers makes of them."""

import json
import shutil
import warnings

import numpy as np
import pytest

from tests.configs import PUBLISHED
from tests.models.test_compiled import running
from tests.models.tiny import DATA, random_model
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli.description import describe
from tpcpu.engine.engine import Engine, Options
from tpcpu.errors import CheckpointError
from tpcpu.formats import int8, nf4
from tpcpu.parallel.communicator import Solo
from tpcpu.quantize import quantize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file, save_file = (getattr(pytest.importorskip("safetensors.torch"), f"{verb}_file") for verb in ("load", "save"))

MODEL = DATA / "llama-tiny"
BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNEL = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def write(folder, section, change=lambda _: None):
    """llama-tiny with its projections in fp8: of 704 features, the last block is short. Returns what was stored."""
    stored = load_file(MODEL / "model.safetensors")
    round_projections(stored, section)
    if section is CHANNEL:
        stored["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)
    change(stored)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    shutil.copy(MODEL / "tokenizer.model", folder)
    return stored


def round_projections(stored, section):
    """In place: to fp8, with scales as the section of the config says."""
    block = section.get("weight_block_size", [None])[0]
    for name in [name for name in stored if "_proj" in name]:
        values, (rows, columns) = stored[name].float(), stored[name].shape
        if block is not None:
            padded = torch.nn.functional.pad(values, (0, -columns % block, 0, -rows % block))
            scales = padded.reshape(-(-rows // block), block, -1, block).abs().amax((1, 3)) / 448
            wide = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        else:
            scales = wide = values.abs().amax(1, keepdim=True) / 448
        stored[name] = (values / wide).to(torch.float8_e4m3fn)
        stored[f"{name.removesuffix('weight')}weight_scale{'_inv' if block else ''}"] = scales


def test_values_are_those_that_transformers_reads(tmp_path):
    """It reads no blocks that are short."""
    write(tmp_path / "fp8", BLOCK | {"weight_block_size": [64, 64]})
    quantize(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.FineGrainedFP8Config(dequantize=True)
        model = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "fp8", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
    theirs = dict(model.named_parameters())
    with Checkpoint.open(tmp_path / "bf16") as checkpoint:
        assert set(theirs) == set(checkpoint.tensors)
        for name in theirs:
            if "_proj" in name:
                ours = checkpoint.array(name).view(np.uint16)
                assert np.array_equal(ours, theirs[name].detach().view(torch.uint16).numpy()), name


@pytest.mark.parametrize("form", [nf4, int8], ids=["nf4", "int8"])
@pytest.mark.parametrize("section", [BLOCK, CHANNEL], ids=["block", "channel"])
def test_quantised_anew(tmp_path, section, form):
    write(tmp_path / "fp8", section)
    for target in ("bf16", form.__name__.rpartition(".")[2]):
        quantize(tmp_path / "fp8", tmp_path / target, target)
    with Checkpoint.open(tmp_path / "bf16") as plain, Checkpoint.open(tmp_path / target) as written:
        stored = [name for name in plain.tensors if form.is_stored(name, written.tensors)]
        assert len(stored) == sum("_proj" in name for name in plain.tensors)
        for name in stored[:7]:
            for part, expected in form.to_tensors(name, form.quantize(plain.array(name))).items():
                assert np.array_equal(written.array(part), expected), part


IDS = [1, 17, 300, 45, 9, 201, 77, 5, 123, 88, 400, 31]


@pytest.mark.parametrize("form", [None, "nf4", "int8", "float32"])
@pytest.mark.parametrize("section", [BLOCK, CHANNEL], ids=["block", "channel"])
def test_served_as_the_bfloat16_weights_that_they_stand_for(tmp_path, section, form):
    """In every bit, also where they are quantised while loading."""
    write(tmp_path / "fp8", section)
    quantize(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    logits = []
    for folder in (tmp_path / "fp8", tmp_path / "bf16"):
        with running(folder, format=form, exact=True) as runner:
            logits.append(runner.logits(IDS, wanted=list(range(len(IDS)))))
    assert np.array_equal(*(each.view(np.uint32) for each in logits))


DEEPSEEK = PUBLISHED["deepseek-v3"] | {
    "vocab_size": 420, "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 80, "n_routed_experts": 8,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


def write_deepseek(folder, change=lambda _: None):
    """As DeepSeek-V3 is published: all projections in fp8, and a layer behind the last one that nobody reads."""
    dtypes = {"e_score_correction_bias": torch.float32}
    stored = {
        name: torch.from_numpy(values).to(dtypes.get(name.rpartition(".")[2], torch.bfloat16))
        for name, values in random_model(DEEPSEEK).tensors.items()
    }
    behind = {name.replace(".1.", ".2.", 1): values for name, values in stored.items() if "layers.1." in name}
    stored |= behind | {"model.layers.2.eh_proj.weight": torch.ones(192, 384).bfloat16()}
    round_projections(stored, BLOCK)
    change(stored)
    folder.mkdir()
    save_file({name: values.clone() for name, values in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    return stored


@pytest.mark.parametrize("form", [None, "nf4"])
def test_deepseek_v3_as_published(tmp_path, form):
    stored = write_deepseek(tmp_path / "fp8")
    quantize(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    logits = []
    for folder in (tmp_path / "fp8", tmp_path / "bf16"):
        with running(folder, format=form, exact=True) as runner:
            logits.append(runner.logits(IDS[:8], wanted=list(range(8))))
    assert np.array_equal(*(each.view(np.uint32) for each in logits))
    with Checkpoint.open(tmp_path / "bf16") as checkpoint:
        assert not any("layers.2." in name for name in checkpoint.tensors)
    with Checkpoint.open(tmp_path / "fp8") as checkpoint:
        found = describe(checkpoint)
    assert not found.unsupported
    assert found.not_needed == sorted(name for name in stored if "layers.2." in name and "scale_inv" not in name)


KV_B = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(f"{KV_B}_scale_inv"), rf"tensor {KV_B} is fp8; expected its scales"),
        (lambda stored: stored.update({f"{KV_B}_scale_inv": torch.ones(2, 4)}), rf"tensor {KV_B}_scale_inv: shape"),
        (lambda stored: stored.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "e_score_correction_bias"),
        (lambda stored: stored.update({"model.layers.3.eh_proj.weight": torch.ones(1)}), "model.layers.3.eh_proj"),
    ],
)
def test_what_is_wrong_with_a_deepseek_is_named(tmp_path, change, message):
    write_deepseek(tmp_path / "fp8", change)
    with pytest.raises(CheckpointError, match=message):
        Engine(tmp_path / "fp8", Solo(), Options(exact=True))


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(f"{UP}_scale_inv"), rf"tensor {UP} is fp8; expected its scales"),
        (
            lambda stored: stored.update({f"{UP}_scale_inv": torch.ones(2, 6)}),
            rf"tensor {UP}_scale_inv: shape \[2, 6\]",
        ),
        (lambda stored: stored[f"{UP}_scale_inv"].fill_(float("nan")), f"tensor {UP}_scale_inv holds NaN"),
        (lambda stored: stored[UP].view(torch.uint8)[3, 5:6].fill_(127), rf"tensor {UP} holds nan at \[3, 5\]"),
        (lambda stored: stored.update({"stranger": torch.ones(1)}), "stranger does not belong"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    write(tmp_path / "fp8", BLOCK, change)
    with pytest.raises(CheckpointError, match=message):
        quantize(tmp_path / "fp8", tmp_path / "nf4", "nf4")
    with pytest.raises(CheckpointError, match=f"{UP}|stranger"):
        Engine(tmp_path / "fp8", Solo(), Options(exact=True))


@pytest.mark.parametrize("section", [BLOCK, CHANNEL], ids=["block", "channel"])
def test_inspect(tmp_path, section):
    stored = write(tmp_path / "fp8", section)
    with Checkpoint.open(tmp_path / "fp8") as checkpoint:
        found = describe(checkpoint)
    assert found.parameters == 6524160
    assert sum(found.bytes_by_format.values()) == found.total_bytes
    assert found.parameters_by_format["fp8"] == sum(
        values.numel() for name, values in stored.items() if name[-12:] == "_proj.weight"
    )
    assert not found.unsupported
