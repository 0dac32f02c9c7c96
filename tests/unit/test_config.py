"""Reading config.json: what is supported is read, what changes the mathematics is refused in one line."""

import json
import math
from pathlib import Path

import pytest

from tests.configs import PUBLISHED
from tpcpu.errors import ConfigError, LaunchError
from tpcpu.models import ARCHITECTURES, read_config
from tpcpu.parallel.partition import Share
from tpcpu.program.rope import LinearScaling

DATA = Path(__file__).parents[1] / "data"

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
YUAN = {
    "model_type": "yuan", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def refused(config):
    with pytest.raises(ConfigError) as error:
        read_config(config)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("config.json: ")
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("name", ["yuan-tiny", "llama-tiny", "stories260k"])
def test_the_bundled_models_are_read(name):
    config = json.loads((DATA / name / "config.json").read_text())
    model = read_config(config)
    assert model.config.hidden_size == config["hidden_size"]
    assert model.config.vocab_size == config["vocab_size"]
    assert model.config.tie_word_embeddings == config["tie_word_embeddings"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_are_read(name):
    layers = PUBLISHED[name].get("num_hidden_layers") or PUBLISHED[name]["num_layers"]
    assert read_config(PUBLISHED[name]).config.num_hidden_layers == layers


def test_defaults_are_those_of_the_publishers():
    llama, yuan = read_config(LLAMA).config, read_config(YUAN).config
    assert (llama.rope.theta, llama.rms_norm_eps, llama.head_dim) == (10000.0, 1e-6, 64)
    assert not llama.tie_word_embeddings
    assert not llama.qkv_bias
    assert read_config({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).config.num_key_value_heads == 4
    assert yuan.tie_word_embeddings
    assert (yuan.rope_theta, yuan.head_dim, yuan.max_position_embeddings) == (10000.0, 64, 4096)


def test_mistrals_window():
    mistral = LLAMA | {"model_type": "mistral"}
    windows = {None: 0, 100: 100}
    assert {w: set(read_config(mistral | {"sliding_window": w}).config.windows) for w in windows} == {
        w: {windows[w]} for w in windows
    }
    assert read_config(mistral).config.windows == (4096, 4096), "where a writer says nothing"
    assert read_config(LLAMA).config.windows == (0, 0)
    for wrong in (0, -1, True, 1.5, "all"):
        assert "sliding_window" in refused(mistral | {"sliding_window": wrong})
    assert "sliding_window" in refused(LLAMA | {"sliding_window": 100})
    assert "attention_bias" in refused(mistral | {"attention_bias": True})


def test_rope_theta_is_found_where_newer_writers_put_it():
    config = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert read_config(config).config.rope.theta == 500000.0


@pytest.mark.parametrize("model_type", ["mamba", "deepseek_v32", "llava", "mllama", "llama4", "gpt2", 7, None])
def test_other_architectures_are_refused_by_name(model_type):
    message = refused(LLAMA | {"model_type": model_type})
    assert repr(model_type) in message
    assert ", ".join(ARCHITECTURES) in message


CHATGLM = {
    "model_type": "chatglm", "multi_query_attention": True, "multi_query_group_num": 2, "num_layers": 2,
    "padded_vocab_size": 65024,
}  # fmt: skip


def test_what_rope_ratio_stretches():
    """The base, but in ChatGLM2 for long texts positions: which of them a config alone does not say."""
    named = {"chatglm2-6b-32k": (10000.0, LinearScaling(8.0)), "chatglm3-6b-32k": (80000.0, None)}
    for name, wanted in named.items():
        rope = read_config(CHATGLM | {"rope_ratio": 8, "_name_or_path": f"THUDM/{name}"}).config.rope
        assert (rope.theta, rope.scaling) == wanted
    assert read_config(CHATGLM | {"rope_ratio": 500, "padded_vocab_size": 151552}).config.rope.theta == 5e6
    assert read_config(CHATGLM | {"rope_ratio": 1}).config.rope.theta == 10000.0
    for name in (None, "/models/mine", "chatglm2-to-chatglm3", 3):
        assert "expected _name_or_path" in refused(CHATGLM | {"rope_ratio": 8, "_name_or_path": name})


def test_heads_of_chatglm_that_lie_one_after_another_are_refused():
    for value in (False, None):
        assert "multi_query_attention" in refused(CHATGLM | {"multi_query_attention": value})


def test_two_names_of_one_setting_of_qwen_agree():
    config = {"model_type": "qwen", "seq_length": 8192, "rotary_emb_base": 1000000, "vocab_size": 152064}
    twice = {"rope_theta": 1000000, "padded_vocab_size": 152064, "tokenizer_type": "QWenTokenizer"}
    assert read_config(config | twice).config.rotary_emb_base == 1e6
    for key in ("rope_theta", "padded_vocab_size"):
        assert key in refused(config | twice | {key: 10000})


V2, V3 = PUBLISHED["deepseek-v2-lite"], PUBLISHED["deepseek-v3"]


def test_latent_attention():
    """Rotated in neighbours; yarn scales the whole head, the rotated part too, which is divided by it again."""
    config = read_config(V3).config
    assert (config.rope.interleaved, config.rope.length, config.rope.dim) == (True, 1.0, 64)
    assert config.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert read_config(V3 | {"rope_scaling": None}).config.scale == 192**-0.5
    assert not read_config(V3 | {"rope_interleave": False}).config.rope.interleaved
    assert (config.groups, config.mixed[:4], config.shared_size) == ((8, 4, 2), (False, False, False, True), 2048)
    assert read_config(V2 | {"moe_layer_freq": 2}).config.mixed == tuple(n >= 1 and n % 2 == 0 for n in range(27))
    assert read_config(V2 | {"n_shared_experts": None}).config.shared_size == 0


def test_layers_that_guess_further_tokens_are_left_out():
    model = read_config(V3)
    guessing = ("embed_tokens.weight", "mlp.experts.7.up_proj.weight_scale_inv", "shared_head.head.weight")
    assert all(model.is_optional(f"model.layers.61.{name}") for name in guessing)
    assert not any(model.is_optional(f"model.layers.{layer}.eh_proj.weight") for layer in (6, 60, 62, 610))
    assert not read_config(V3 | {"num_nextn_predict_layers": 0}).is_optional("model.layers.61.eh_proj.weight")


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (V2, "topk_method", "noaux_tc"), (V2, "scoring_func", "sigmoid"), (V2, "norm_topk_prob", True),
        (V2, "mlp_bias", True), (V2, "rope_interleave", True), (V2, "num_key_value_heads", 4),
        (V3, "topk_method", "greedy"), (V3, "scoring_func", "softmax"), (V3, "n_group", 7), (V3, "topk_group", 9),
        (V3, "num_experts_per_tok", 200), (V3, "kv_lora_rank", None), (V3, "qk_rope_head_dim", 63),
        (V3, "head_dim", 128), (V3, "hidden_act", "gelu"), (V3, "rope_scaling", {"type": "longrope", "factor": 2.0}),
        (V3, "rope_scaling", V3["rope_scaling"] | {"mscale_all_dim": "1"}),
    ],
)  # fmt: skip
def test_variants_of_deepseek_are_refused(base, key, value):
    assert key in refused(base | {key: value})


MIXTURE = {"moe_num_experts": 32, "moe_top_k": 2, "ffn_hidden_size": 256}


def test_experts_of_yuan():
    """The released code has 10000 for the base, the authors' scripts 40890: a key tells them apart."""
    config = read_config(YUAN | {"moe_config": MIXTURE, "attention_projection_size": 512}).config
    assert (config.head_dim, config.rotated, config.rope_theta) == (128, 64, 10000.0)
    assert config.experts.normalised
    assert read_config(YUAN | {"moe_config": MIXTURE, "rope_theta": 40890}).config.rope_theta == 40890.0
    assert read_config(YUAN | {"moe_config": {}, "use_moe": False}).config.experts is None


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("moe_config.moe_num_experts", {"use_moe": True}),
        ("use_moe", {"use_moe": False, "moe_config": MIXTURE}),
        ("moe_config", {"moe_config": [32, 2]}),
        ("moe_config.moe_top_k", {"moe_config": MIXTURE | {"moe_top_k": 33}}),
        ("moe_config.ffn_hidden_size", {"moe_config": MIXTURE | {"ffn_hidden_size": "256"}}),
        ("moe_config.gated_linear_unit", {"moe_config": MIXTURE | {"gated_linear_unit": False}}),
        ("moe_config.moe_of_tomorrow", {"moe_config": MIXTURE | {"moe_of_tomorrow": 1}}),
        ("attention_projection_size", {"attention_projection_size": 128}),
        ("attention_projection_size", {"attention_projection_size": 513}),
    ],
)
def test_wrong_experts_of_yuan_are_refused(key, values):
    assert f"{key} " in refused(YUAN | values)


@pytest.mark.parametrize("base", [LLAMA, YUAN], ids=["llama", "yuan"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "dynamic", "factor": "2"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "a_setting_of_tomorrow": 1}),
        ("rope_scaling", {"rope_type": ["linear"], "factor": 2.0}),
        ("rope_scaling", {"rope_type": "proportional", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": -1.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("hidden_act", "gelu"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("hidden_act", ["silu"]),
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("attention_chunk_size", 8192),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 256),
        ("partial_rotary_factor", 0.5),
        ("rotary_pct", 0.25),
        ("logits_scaling", 8.0),
        ("logits_scaling", 0),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", True),
        ("use_qk_norm", True),
        ("qk_layernorm", 1),
        ("alibi", True),
        ("parallel_attn", True),
        ("num_local_experts", 8),
        ("num_experts", 1),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("vision_config", {"hidden_size": 8}),
        ("a_setting_of_tomorrow", "on"),
        ("a_setting\nof tomorrow", "on"),
        ("x" * 5000, "y" * 5000),
    ],
)  # fmt: skip
def test_what_changes_the_mathematics_is_refused(base, key, value):
    assert repr(key)[1:-1][:9] in refused(base | {key: value})


def test_a_switch_that_is_on_is_not_taken_for_the_number_one():
    """True equals 1.0 in Python: `use_sliding_window: true` once passed as a neutral factor."""
    assert "use_sliding_window" in refused(LLAMA | {"use_sliding_window": True})


@pytest.mark.parametrize(("key", "value"), [("use_shareqk", True), ("use_moe", "yes"), ("use_shareqk", "yes")])
def test_variants_of_yuan_are_refused(key, value):
    assert key in refused(YUAN | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", None), ("rope_scaling", {"type": "default"}), ("sliding_window", None), ("num_experts", 0),
        ("use_sliding_window", False), ("partial_rotary_factor", 1.0), ("final_logit_softcapping", None),
        ("layer_types", []), ("pretraining_tp", 2), ("torch_dtype", "float16"), ("quantization_config", {"a": 1}),
        ("pruned_heads", {}), ("is_encoder_decoder", False), ("rms_norm_eps", 1e-5), ("head_dim", 32),
    ],
)  # fmt: skip
def test_what_is_off_or_changes_nothing_is_accepted(key, value):
    read_config(LLAMA | {key: value})


@pytest.mark.parametrize("base", [LLAMA, YUAN], ids=["llama", "yuan"])
@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize(
    "value", [None, 0, -1, True, 1.5, "256", [256], {}, 2**31, 10**30, 10**400, float("nan")], ids=lambda v: repr(v)[:9]
)
def test_sizes_are_positive_integers_within_reason(base, key, value):
    assert key in refused(base | {key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "value", [0, -1.0, True, "1e-5", float("nan"), float("inf"), 10**400, 1e300, 1e-300], ids=lambda v: repr(v)[:9]
)
def test_numbers_are_positive_and_fit_a_float32(key, value):
    """10**400 once ended in an OverflowError."""
    assert key in refused(LLAMA | {key: value})


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [0, 1, "true", [], 1.0])
def test_flags_are_true_or_false(key, value):
    assert key in refused(LLAMA | {key: value})


def test_impossible_divisions_are_refused():
    assert "multiple of num_key_value_heads = 3" in refused(LLAMA | {"num_key_value_heads": 3})
    assert "multiple of num_key_value_heads = 8" in refused(LLAMA | {"num_key_value_heads": 8})
    assert "multiple of num_attention_heads = 3" in refused(YUAN | {"num_attention_heads": 3})
    assert "head_dim" in refused(LLAMA | {"head_dim": 33})
    assert "rotated pair" in refused(YUAN | {"num_attention_heads": 256})
    assert "head_dim" in refused(LLAMA | {"head_dim": 2**23})


@pytest.mark.parametrize("config", [[], None, "llama", 7])
def test_a_config_that_is_no_object_is_refused(config):
    assert "expected an object" in refused(config)


def test_more_ranks_than_panels_are_refused_with_the_counts_that_work():
    model = read_config(LLAMA)
    assert model.max_ranks == 704 // 16
    model.program(Share(43, 44))
    with pytest.raises(LaunchError, match="1 to 44 ranks work"):
        model.program(Share(0, 45))


def test_the_output_head_counts_as_a_weight():
    assert read_config({**LLAMA, "vocab_size": 4096}).max_ranks == 4096 // 16
