"""GGUF files as input of `quantize`: written by the `gguf` package, read back by transformers, and by us."""

import json

import numpy as np
import pytest

from tests.models.tiny import DATA, load
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli import main
from tpcpu.errors import CheckpointError
from tpcpu.formats import nf4
from tpcpu.quantize import quantize
from tpcpu.text import load_tokenizer

gguf = pytest.importorskip("gguf")

TYPES = gguf.GGMLQuantizationType
SHORT = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
TEXT = 'Once upon a time, Lily (3 years old) said: "Let\'s go!"  2024 — naïve 你好 🙂\n\tEnd.'


def short(name):
    found = next(theirs for ours, theirs in SHORT.items() if ours in name)
    layer = name.split(".")[2] if ".layers." in name else None
    return f"{f'blk.{layer}.' if layer else ''}{found}.weight"


def turned(values, heads):
    """The order of rows that llama.cpp stores for q and k: the two halves of each head, alternately."""
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def write(path, change=lambda _: None, type_of=lambda _: TYPES.F32, **settings):
    """llama-tiny, quantised by the `gguf` package; what its dequantiser gives, by our names, in our order of rows."""
    config = json.loads((DATA / "llama-tiny" / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama", **settings)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    add_sentencepiece(writer)
    change(writer)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    expected = {}
    for name, stored in load("llama-tiny").tensors.items():
        values, kind = np.asarray(stored, np.float32), type_of(name) if stored.ndim == 2 else TYPES.F32
        count = next((count for part, count in heads.items() if part in name), None)
        data = gguf.quants.quantize(turned(values, count) if count else values, kind)
        writer.add_tensor(short(name), data, raw_dtype=kind)
        expected[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return expected


def add_sentencepiece(writer):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "llama-tiny" / "tokenizer.model"))
    count = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in count]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in count])
    writer.add_token_scores([pieces.get_score(i) for i in count])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


MIXED = {"q_proj": "Q8_0", "k_proj": "Q5_0", "v_proj": "F16", "o_proj": "BF16", "gate_proj": "Q4_0", "up_proj": "Q4_1",
         "down_proj": "Q5_1", "embed_tokens": "Q8_0"}  # fmt: skip


def mixed(name):
    return TYPES[next((kind for part, kind in MIXED.items() if part in name), "F32")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of many types, and its values."""
    file = tmp_path_factory.mktemp("gguf") / "tiny-mixed.gguf"
    return file, write(file, type_of=mixed)


def test_values_are_those_of_the_gguf_package(written, tmp_path):
    file, expected = written
    quantize(file, tmp_path / "out", "float32")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for name, values in expected.items():
            assert np.array_equal(checkpoint.array(name), values), name


def test_nf4_is_made_of_these_values(written, tmp_path):
    file, expected = written
    report = quantize(file, tmp_path / "out", "nf4")
    assert not report.kept
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "BF16"
        for part in ("q_proj", "down_proj"):
            name = next(name for name in expected if part in name)
            found = nf4.from_tensors(name, checkpoint.array, checkpoint.tensors)
            wanted = nf4.quantize(expected[name])
            assert found.dtype == "bfloat16"
            assert np.array_equal(found.codes, wanted.codes)
            assert np.array_equal(found.scales(), wanted.scales())


def test_config_and_tokenizer_are_those_of_the_source(written, tmp_path):
    file, _ = written
    quantize(file, tmp_path / "out", "bf16")
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", DATA / "llama-tiny")
    )
    for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert ours[key] == theirs[key], key
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"])
    from_gguf = load_tokenizer(tmp_path / "out", ours)
    from_folder = load_tokenizer(DATA / "llama-tiny", theirs)
    assert from_gguf.encode(TEXT) == from_folder.encode(TEXT)
    assert from_gguf.decode(from_gguf.encode(TEXT)) == from_folder.decode(from_folder.encode(TEXT))
    assert set(from_gguf.stop_ids) == set(from_folder.stop_ids)


def test_inspect(written, capsys):
    file, expected = written
    assert main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["architecture"] == "llama (LlamaForCausalLM)"
    assert found["parameters"] == sum(values.size for values in expected.values())
    assert {"Q8_0", "Q4_1", "bf16"} < set(found["bytes_by_format"])
    (reason,) = found["unsupported"]
    assert "tpcpu quantize" in reason


def test_a_file_that_was_split(tmp_path):
    expected = write(tmp_path / "tiny.gguf", split_max_tensors=20)
    first, *others = sorted(tmp_path.glob("tiny-*-of-*.gguf"))
    assert len(others) > 1
    quantize(others[0], tmp_path / "out", "float32")
    assert (tmp_path / "out" / f"model{first.stem.removeprefix('tiny')}.safetensors").is_file()
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        for name, values in expected.items():
            assert np.array_equal(checkpoint.array(name), values), name
    others[-1].unlink()
    with pytest.raises(CheckpointError, match=f"is one of {1 + len(others)} files; not there: {others[-1].name}"):
        quantize(first, tmp_path / "again", "float32")


def refused(path, message, **settings):
    write(path, **settings)
    with pytest.raises(CheckpointError, match=message) as error:
        quantize(path, path.with_suffix(".out"), "nf4")
    assert str(path) in str(error.value)
    assert not path.with_suffix(".out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "expert_count is 8"),
        (lambda writer: writer.add_rope_dimension_count(8), "rope.dimension_count is 8"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope|rope.scaling.factor"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(7, np.float32)), "rope_freqs.weight"),
        (lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)), "attn_sinks"),
        (lambda writer: writer.add_tokenizer_model("bert"), "tokenizer.ggml.model is 'bert'"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path, change, message):
    def replaced(writer):
        # the package refuses a key that stands already
        writer.kv_data[0].pop("llama.rope.dimension_count", None)
        writer.kv_data[0].pop("tokenizer.ggml.model", None)
        change(writer)
        for key, add in (
            ("llama.rope.dimension_count", lambda: writer.add_rope_dimension_count(64)),
            ("tokenizer.ggml.model", lambda: writer.add_tokenizer_model("llama")),
        ):
            if key not in writer.kv_data[0]:
                add()

    refused(tmp_path / "a.gguf", message, change=replaced)


def test_llama_3_scaling_is_found_again(tmp_path):
    torch = pytest.importorskip("torch")  # noqa: F841  (transformers needs it for this)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=scaling
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    write(tmp_path / "a.gguf", change=lambda writer: (
        writer.kv_data[0].pop("llama.rope.freq_base"), writer.add_rope_freq_base(500000.0),
        writer.kv_data[0].pop("llama.rope.dimension_count"), writer.add_rope_dimension_count(64),
        writer.add_tensor("rope_freqs.weight", (plain / theirs.numpy()).astype(np.float32)),
    ))  # fmt: skip
    from tpcpu.quantize.gguf import GgufCheckpoint

    with GgufCheckpoint.open(tmp_path / "a.gguf") as checkpoint:
        found = checkpoint.config["rope_scaling"]
        assert found == {key: value for key, value in scaling.items() if key != "rope_theta"}
