"""A mixture of experts as a GGUF file: named and quantised by the `gguf` package, read as the folder it was made of."""

import json

import numpy as np
import pytest

from tests.models.families import FAMILIES, Family, make_family
from tests.models.tiny import DATA
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli.description import describe
from tpcpu.errors import CheckpointError
from tpcpu.formats import floats, nf4
from tpcpu.models import read_config
from tpcpu.quantize import open_source, quantize

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")

TYPES = gguf.GGMLQuantizationType
EXPERTS = 6
FAMILY = Family(
    "qwen3_moe",
    {key: value for key, value in FAMILIES["qwen3_moe"].config.items() if key != "use_sliding_window"}
    | {"mlp_only_layers": [], "moe_intermediate_size": 128, "num_experts": EXPERTS, "sliding_window": None},
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder, and its config."""
    folder = tmp_path_factory.mktemp("source")
    make_family(FAMILY, folder)
    return folder, json.loads((folder / "config.json").read_text())


def kind_of(name):
    """Different types for the experts' matrices; routers and norms are floats in such files."""
    if "experts" in name:
        return {"gate": TYPES.Q4_0, "up": TYPES.Q8_0, "down": TYPES.Q5_1}[name.split(".")[-2].removesuffix("_proj")]
    return TYPES.F16 if "o_proj" in name else TYPES.Q8_0 if "_proj" in name else TYPES.F32


def write(path, folder, config, change=lambda _: None):
    """As llama.cpp writes it: experts of a layer in one tensor. What its dequantiser gives, by our names."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    expected, stacks = {}, {}
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.tensors:
            values = floats.to_float32(np.array(checkpoint.array(name)))
            data = gguf.quants.quantize(values, kind_of(name))
            expected[name] = gguf.quants.dequantize(data, kind_of(name))
            if ".experts." not in name:
                theirs = names.get_name(name, try_suffixes=(".weight",))
                writer.add_tensor(theirs, data, raw_dtype=kind_of(name))
                continue
            before, number, part, _ = name.rsplit(".", 3)
            stacks.setdefault((f"{before}.{part}.weight", kind_of(name)), {})[int(number)] = data
    for (merged, kind), each in stacks.items():
        whole = np.stack([each[number] for number in range(EXPERTS)])
        writer.add_tensor(names.get_name(merged, try_suffixes=(".weight",)), whole, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (path.parent / "tokenizer.model").write_bytes((DATA / "llama-tiny" / "tokenizer.model").read_bytes())
    return expected


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny-moe.gguf"
    return file, write(file, *source)


def test_values_and_config(source, written, tmp_path):
    """Every expert's matrices by their own names, and a config that means what the source's does."""
    file, expected = written
    quantize(file, tmp_path / "out", "float32")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for name, values in expected.items():
            assert np.array_equal(checkpoint.array(name), values), name
        ours, theirs = vars(read_config(checkpoint.config).config), vars(read_config(source[1]).config)
    # float32 in the file.
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"))
    assert ours == theirs


def test_nf4_is_made_of_these_values(written, tmp_path):
    file, expected = written
    quantize(file, tmp_path / "out", "nf4")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        for part in ("gate", "up", "down"):
            name = f"model.layers.2.mlp.experts.4.{part}_proj.weight"
            if expected[name].shape[1] % 64:
                assert np.array_equal(checkpoint.array(name), floats.convert(expected[name], "bfloat16"))
                continue
            wanted = nf4.quantize(expected[name])
            found = nf4.from_tensors(name, checkpoint.array, checkpoint.tensors)
            assert np.array_equal(found.codes, wanted.codes)
            assert np.array_equal(found.scales(), wanted.scales())


def test_inspect(written):
    file, expected = written
    with open_source(file) as checkpoint:
        found = describe(checkpoint)
    assert found.parameters == sum(values.size for values in expected.values())
    assert found.parameters - found.parameters_per_token == 3 * 3 * (EXPERTS - 3) * 96 * 128
    (reason,) = found.unsupported
    assert "tpcpu quantize" in reason


@pytest.mark.parametrize(
    ("key", "message"), [("expert_used_count", "lack qwen3moe.expert_used_count"), ("expert_count", "expert_count")]
)
def test_missing_keys_are_named(source, tmp_path, key, message):
    file = tmp_path / "a.gguf"
    write(file, *source, change=lambda writer: writer.kv_data[0].pop(f"qwen3moe.{key}"))
    with pytest.raises(CheckpointError, match=message):
        quantize(file, tmp_path / "out", "nf4")
