"""Folders whose experts are in mxfp4: served as they are, every weight with the bits that transformers makes of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.models.families import FAMILIES, make, make_family, text
from tests.models.test_compiled import TURNED, running
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli.description import describe
from tpcpu.cli.description import text as description
from tpcpu.engine.engine import Engine, Options
from tpcpu.errors import CheckpointError, UsageError
from tpcpu.formats import mxfp4
from tpcpu.kernels import record as R
from tpcpu.models import read_config
from tpcpu.parallel.communicator import Solo
from tpcpu.quantize import quantize

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
load_file, save_file = (getattr(pytest.importorskip("safetensors.torch"), f"{verb}_file") for verb in ("load", "save"))

IDS = text(30)
WANTED = list(range(len(IDS)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make("gpt_oss-mxfp4", tmp_path_factory.mktemp("gpt-oss"))


def oracle(blocks, scales):
    """(experts, columns, rows) float32, as transformers reads them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def test_every_value_there_is():
    """All codes at all scales that weights can have."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, mxfp4.LARGEST + 1, 1, 1)
    scales = torch.arange(mxfp4.LARGEST + 1, dtype=torch.uint8).reshape(1, -1, 1).repeat(1, 1, 16)
    theirs = oracle(blocks, scales)[0].T.contiguous().numpy()
    ours = mxfp4.dequantize(blocks[0].reshape(-1, 256).numpy(), scales[0].numpy())
    assert np.isfinite(theirs).all()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_weights_of_experts_have_the_bits_of_transformers(made):
    stored = load_file(made.folder / "model.safetensors")
    with Checkpoint.open(made.folder) as checkpoint:
        checkpoint.take_apart(read_config(checkpoint.config).stacks)
        for module in (f"model.layers.{layer}.mlp.experts" for layer in range(2)):
            whole = {
                name: oracle(*(stored[f"{module}.{name}_{part}"] for part in ("blocks", "scales"))).numpy()
                for name in ("gate_up_proj", "down_proj")
            }
            for expert in range(5):
                gate_up, down = (whole[name][expert].T for name in ("gate_up_proj", "down_proj"))
                wanted = {"gate_proj": gate_up[0::2], "up_proj": gate_up[1::2], "down_proj": down}
                for name, values in wanted.items():
                    codes, scales = (
                        checkpoint.array(f"{module}.{expert}.{name}.weight{end}") for end in ("", ".scales")
                    )
                    ours = mxfp4.dequantize(codes, scales)
                    assert np.array_equal(ours.view(np.uint32), np.ascontiguousarray(values).view(np.uint32))


@pytest.mark.parametrize(
    ("form", "exact", "tolerance"),
    # NF4 of the other matrices is another model.
    [(None, True, 1e-3), (None, False, TURNED), ("int8", False, TURNED), ("nf4", False, 4.0)],
)
def test_experts_stay_as_they_are(made, form, exact, tolerance):
    """Whatever becomes of the other matrices; none of them is dequantised."""
    with running(made.folder, format=form, exact=exact) as runner:
        held = {key[0]: packed.form for key, packed in runner.engine.weights.items() if key[0].endswith("_proj.weight")}
        assert {form for name, form in held.items() if ".experts." in name} == {R.MXFP4}
        others = {None: R.BF16, "nf4": R.NF4, "int8": R.INT8}
        assert held["model.layers.1.self_attn.q_proj.weight"] == others[form]
        got = runner.logits(IDS, wanted=WANTED)
    differences = np.abs(got - made.logits(IDS))
    assert differences.max() < tolerance


def test_rows_that_cut_blocks_are_dequantised(tmp_path):
    """Of 96 values: blocks of 64, which kernels multiply, would cross them."""
    family = FAMILIES["gpt_oss-mxfp4"]
    cut = make_family(replace(family, config=family.config | {"hidden_size": 96}), tmp_path)
    with running(tmp_path, exact=True) as runner:
        assert np.abs(runner.logits(IDS, wanted=WANTED) - cut.logits(IDS)).max() < 1e-3
    with Checkpoint.open(tmp_path) as checkpoint:
        found = describe(checkpoint)
    reason = found.not_quantized["model.layers.0.mlp.experts.2.up_proj.weight"]
    assert reason == "dequantised at loading: rows of 96 values cut blocks"
    assert "model.layers.0.mlp.experts.2.down_proj.weight" not in found.not_quantized


def test_inspect(made):
    with Checkpoint.open(made.folder) as checkpoint:
        found = describe(checkpoint)
    assert found.unsupported == []
    weights = 2 * 5 * 3 * 128 * 320
    assert found.parameters_by_format["mxfp4"] == weights
    assert found.bytes_by_format["mxfp4"] == weights * 17 // 32
    assert f"mxfp4: {weights:,} parameters, {weights * 17 // 32 / 1e6:.2f} MB, 4.250 bits each" in description(found)
    assert found.parameters - found.parameters_per_token == 2 * 2 * (3 * 128 * 320 + 2 * 320 + 128)


def test_what_makes_no_sense_is_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match=r"have 4 bits already \(mxfp4\)"):
        quantize(made.folder, tmp_path / "nf4", "nf4")
    with pytest.raises(UsageError, match="stored as mxfp4: it cannot be held as bf16"):
        Engine(made.folder, Solo(), Options("bf16"))


STACK = "model.layers.1.mlp.experts.gate_up_proj"
PART = "model.layers.1.mlp.experts.0.gate_proj.weight"


def put(suffix, change):
    return lambda stored: stored.update({f"{STACK}_{suffix}": change(stored[f"{STACK}_{suffix}"])})


def set_scale(scales):
    scales[3, 7, 1] = 255
    return scales


BAD = {
    "no scales": (
        lambda stored: stored.pop(f"{STACK}_scales"),
        rf"tensor {PART}.scales is missing, and not a part of {STACK}_scales",
    ),
    "no blocks": (lambda stored: stored.pop(f"{STACK}_blocks"), f"tensor {PART} is missing, and .*{STACK}_blocks"),
    "scales of fewer blocks": (
        put("scales", lambda scales: scales[:, :, 1:].contiguous()),
        rf"{PART}, a part of {STACK}_blocks, .*{STACK}_scales, has codes of 320 x 128 .* shape \[320, 3\]",
    ),
    "scales of fewer rows": (
        put("scales", lambda scales: scales[:, 2:].contiguous()), rf"{STACK}_scales, .* shape \[319, 4\]",
    ),
    "scales without experts": (put("scales", lambda scales: scales[0].contiguous()), rf"{STACK}_scales has shape \[6"),
    "scales in floats": (put("scales", lambda scales: scales.float()), rf"{STACK}_scales, is U8 .* scales in F32"),
    "a scale that is no number": (put("scales", set_scale), f"3.up_proj.weight.scales, a part of {STACK}_scales"),
    "half the blocks": (put("blocks", lambda blocks: blocks[..., :8].contiguous()), f"{STACK}_blocks, "),
    "blocks in rows": (put("blocks", lambda blocks: blocks.flatten(2)), rf"{STACK}_blocks has shape \[5, 640, 64\]"),
    "blocks of odd rows": (put("blocks", lambda blocks: blocks[:, 1:].contiguous()), f"{STACK}_blocks has shape"),
    "blocks of too few rows": (
        lambda stored: [put(each, lambda values: values[:, 2:].contiguous())(stored) for each in ("blocks", "scales")],
        rf"{PART}, a part of {STACK}_blocks, has shape \[319, 128\], but config.json describes \[320, 128\]",
    ),
    "blocks of other bytes": (
        put("blocks", lambda blocks: blocks.to(torch.int8)), f"{PART}, a part of {STACK}_blocks, is I8",
    ),
    "an expert too few": (
        lambda stored: [put(each, lambda values: values[:4].contiguous())(stored) for each in ("blocks", "scales")],
        rf"experts.4.gate_proj.weight is missing, .*{STACK}_blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(made, tmp_path, change, message):
    stored = load_file(made.folder / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(made.folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Engine(tmp_path, Solo(), Options(exact=True))


def test_a_config_that_says_nothing_of_it(made, tmp_path):
    """The tensors say what they are."""
    shutil.copy(made.folder / "model.safetensors", tmp_path)
    config = json.loads((made.folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with running(tmp_path, exact=True) as runner:
        assert np.abs(runner.logits(IDS, wanted=WANTED) - made.logits(IDS)).max() < 1e-3
