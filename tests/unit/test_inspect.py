"""What `tpcpu inspect` says of folders that work, that are quantised, and that do not work."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tpcpu.checkpoint import Checkpoint
from tpcpu.cli import description, inspect
from tpcpu.cli.alike import together
from tpcpu.errors import CheckpointError
from tpcpu.formats import int8, nf4

DATA = Path(__file__).parents[1] / "data"


def describe(folder):
    with Checkpoint.open(folder) as checkpoint:
        return description.describe(checkpoint)


@pytest.fixture
def model(tmp_path):
    shutil.copytree(DATA / "stories260k", tmp_path / "model")
    return tmp_path / "model"


def change(folder, tensors=None, config=None):
    weights, settings = folder / "model.safetensors", folder / "config.json"
    if tensors:
        stored = load_file(weights)
        tensors(stored)
        save_file(stored, weights)
    if config:
        settings.write_text(json.dumps(json.loads(settings.read_text()) | config))


def run(capsys, *arguments):
    parser = argparse.ArgumentParser()
    inspect.add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", *map(str, arguments)])
    assert args.run(args) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "parameters", "ranks"),
    [("yuan-tiny", 8150016, 260), ("llama-tiny", 6524160, 256), ("stories260k", 260032, 32)],
)
def test_bundled_models(name, parameters, ranks):
    found = describe(DATA / name)
    assert found.parameters == found.parameters_per_token == parameters
    assert found.ranks == ranks
    assert found.unsupported == []
    assert sum(found.bytes_by_format.values()) == found.total_bytes


@pytest.mark.parametrize("form", [nf4, int8])
def test_a_quantised_folder(model, form):
    def quantize(tensors):
        for name, values in list(tensors.items()):
            if "proj" in name and values.shape[1] % 64 == 0:
                tensors.update(
                    {key: np.array(part) for key, part in form.to_tensors(name, form.quantize(values)).items()}
                )

    change(model, quantize, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    found = describe(model)
    assert found.unsupported == []
    assert found.parameters == 260032
    assert found.parameters_by_format[form.__name__.rpartition(".")[2]] == 171520
    assert set(found.not_quantized) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(5)}
    assert sum(found.bytes_by_format.values()) == found.total_bytes


def test_nf4_that_cuts_rows_is_said_to_be_dequantised(model):
    name = "model.layers.0.mlp.down_proj.weight"

    def quantize(tensors):
        tensors.update({key: np.array(part) for key, part in nf4.to_tensors(name, nf4.quantize(tensors[name])).items()})

    change(model, quantize)
    assert "dequantised at loading" in describe(model).not_quantized[name]


def test_what_is_wrong_is_listed(model):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["stranger"] = np.zeros(3, np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((2, 64), np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 64), np.float64)

    change(model, damage, {"quantization_config": {"quant_method": "gptq"}})
    text = "\n".join(describe(model).unsupported)
    for part in (
        "tensor model.norm.weight is missing",
        "stranger does not belong",
        "[2, 64]",
        "stored as F64",
        "quantised with gptq",
    ):
        assert part in text


def test_what_many_layers_have_in_common_is_told_once(model, capsys):
    """Of all but one of the numbers too; the JSON names every tensor."""

    def damage(tensors):
        for name in [name for name in tensors if name.endswith("o_proj.weight")]:
            tensors[name] = tensors[name][:, :32]
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.3.mlp.up_proj.weight"]

    change(model, damage)
    lines = [line for line in run(capsys, model).splitlines() if line.startswith("not supported: ")]
    assert sorted(lines) == [
        "not supported: tensor model.layers.0-4.self_attn.o_proj.weight has the shape [64, 32], "
        "by config.json it is [64, 64]",
        "not supported: tensor model.layers.1,3.mlp.up_proj.weight is missing",
    ]
    assert len(json.loads(run(capsys, model, "--json").splitlines()[-1])["unsupported"]) == 7
    experts = [f"layers.{layer}.experts.{expert}.up" for layer in (0, 1, 2, 5) for expert in range(4)]
    assert together(["x", *experts, "*.4.*"]) == ["x", "layers.0-2,5.experts.0-3.up", "*.4.*"]
    assert together(experts[1:]) == ["layers.0-2,5.experts.0-3.up (15 of these)"]


def test_an_unknown_architecture_is_described_all_the_same(model, capsys):
    change(model, config={"model_type": "unheard-of"})
    text = run(capsys, model)
    assert "260,032 parameters" in text
    assert "not supported: " in text
    assert "unheard-of" in text
    assert "ranks" not in text


def test_text_and_json(capsys):
    text = run(capsys, DATA / "yuan-tiny")
    assert "8,150,016 parameters in 86 tensors, 16.30 MB in 2 files" in text
    assert "ranks: 1 to 260 work" in text
    result = json.loads(run(capsys, DATA / "yuan-tiny", "--json").splitlines()[-1])
    assert result["ranks"] == 260
    assert result["parameters_by_format"] == {"bf16": 8150016}


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        describe(tmp_path)
