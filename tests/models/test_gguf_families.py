"""Families as GGUF files: named and quantised by the `gguf` package, read as the folders that they were made of."""

import json
from dataclasses import dataclass
from typing import Any

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

TYPES, ARCH = gguf.GGMLQuantizationType, gguf.MODEL_ARCH
EXPERTS = 6


def of_family(name: str, *without: str, **config: Any) -> Family:
    """One of the list, in what such files can say."""
    family = FAMILIES[name]
    kept = {key: value for key, value in family.config.items() if key not in without}
    return Family(family.model_type, kept | config)


def add_experts(writer: Any, config: dict[str, Any]) -> None:
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def add_caps(writer: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def add_bases(writer: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    full = config["rope_parameters"]["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(full["factor"])


@dataclass(frozen=True)
class Case:
    """`add`: the keys that only this family has; `plus`: what llama.cpp's converter adds to norms."""

    family: Family
    architecture: Any
    add: Any
    plus: float = 0.0


CASES = {
    "qwen3moe": Case(
        of_family(
            "qwen3_moe", "use_sliding_window", mlp_only_layers=[], moe_intermediate_size=128, num_experts=EXPERTS,
            sliding_window=None,
        ),
        ARCH.QWEN3MOE, add_experts,
    ),
    "gemma2": Case(of_family("gemma2", query_pre_attn_scalar=24), ARCH.GEMMA2, add_caps, 1.0),
    "gemma3": Case(
        of_family("gemma3", "layer_types", query_pre_attn_scalar=24, num_hidden_layers=7), ARCH.GEMMA3, add_bases, 1.0
    ),
}  # fmt: skip


def kind_of(name, columns):
    """Different types for the experts' matrices; what routes and what is not cut into blocks are floats."""
    if columns % 32:
        return TYPES.F16
    if "experts" in name:
        return {"gate": TYPES.Q4_0, "up": TYPES.Q8_0, "down": TYPES.Q5_1}[name.split(".")[-2].removesuffix("_proj")]
    return TYPES.Q8_0 if "_proj" in name else TYPES.F32


def write(path, case, folder, change=lambda _: None):
    """As llama.cpp writes it: experts of a layer in one tensor. What its dequantiser gives, by our names."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.architecture])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    case.add(writer, config)
    change(writer)
    names = gguf.get_tensor_name_map(case.architecture, config["num_hidden_layers"])
    expected, stacks = {}, {}
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.tensors:
            values = floats.to_float32(np.array(checkpoint.array(name)))
            plus = np.float32(case.plus if "norm" in name else 0)
            kind = kind_of(name, values.shape[-1]) if values.ndim > 1 else TYPES.F32
            data = gguf.quants.quantize(values + plus, kind)
            expected[name] = gguf.quants.dequantize(data, kind) - plus
            if ".experts." not in name:
                writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
                continue
            before, number, part, _ = name.rsplit(".", 3)
            stacks.setdefault((f"{before}.{part}.weight", kind), {})[int(number)] = data
    for (merged, kind), each in stacks.items():
        whole = np.stack([each[number] for number in range(EXPERTS)])
        writer.add_tensor(names.get_name(merged, try_suffixes=(".weight",)), whole, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (path.parent / "tokenizer.model").write_bytes((DATA / "llama-tiny" / "tokenizer.model").read_bytes())
    return expected


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of a case."""
    made = {}

    def source(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_family(CASES[name].family, made[name])
        return made[name]

    return source


@pytest.fixture(scope="module")
def files(sources, tmp_path_factory):
    """The file of a case, and its values."""
    made = {}

    def file(name):
        if name not in made:
            path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
            made[name] = path, write(path, CASES[name], sources(name))
        return made[name]

    return file


@pytest.mark.parametrize("name", CASES)
def test_values_and_config(sources, files, tmp_path, name):
    """Every matrix by its own name, and a config that means what the source's does."""
    file, expected = files(name)
    quantize(file, tmp_path / "out", "float32")
    theirs = json.loads((sources(name) / "config.json").read_text())
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for tensor, values in expected.items():
            assert np.array_equal(checkpoint.array(tensor), values), tensor
        ours, theirs = vars(read_config(checkpoint.config).config), vars(read_config(theirs).config)
    # float32 in the file.
    assert ours.pop("rms_norm_eps") == pytest.approx(theirs.pop("rms_norm_eps"))
    assert ours == theirs


def test_nf4_is_made_of_these_values(files, tmp_path):
    file, expected = files("qwen3moe")
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


def test_inspect(files):
    file, expected = files("qwen3moe")
    with open_source(file) as checkpoint:
        found = describe(checkpoint)
    assert found.parameters == sum(values.size for values in expected.values())
    assert found.parameters - found.parameters_per_token == 3 * 3 * (EXPERTS - 3) * 96 * 128
    (reason,) = found.unsupported
    assert "tpcpu quantize" in reason


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("qwen3moe", "expert_used_count", None, "lack qwen3moe.expert_used_count"),
        ("qwen3moe", "expert_count", None, "lack qwen3moe.expert_count"),
        ("gemma2", "attention.sliding_window", None, "lack gemma2.attention.sliding_window"),
        ("gemma3", "attn_logit_softcapping", 50.0, "gemma3.attn_logit_softcapping is 50.0"),
        ("gemma3", "attention.sliding_window_pattern", 5, "gemma3.attention.sliding_window_pattern is 5"),
    ],
)
def test_keys_that_are_missing_or_have_no_counterpart_are_named(sources, tmp_path, name, key, value, message):
    def change(writer):
        full = f"{CASES[name].family.model_type.replace('_moe', 'moe').removesuffix('_text')}.{key}"
        if value is None:
            writer.kv_data[0].pop(full)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)

    file = tmp_path / "a.gguf"
    write(file, CASES[name], sources(name), change)
    with pytest.raises(CheckpointError, match=message):
        quantize(file, tmp_path / "out", "nf4")


def test_the_largest_gemmas_scale_queries_by_other_than_their_heads(sources, tmp_path):
    """Files do not say so: of Gemma 2 it is known by its 46 layers."""
    file = tmp_path / "a.gguf"

    def deep(writer):
        writer.kv_data[0].pop("gemma2.block_count")
        writer.add_block_count(46)

    write(file, CASES["gemma2"], sources("gemma2"), deep)
    with open_source(file) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 96 // 6
