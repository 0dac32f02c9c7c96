"""A mixture of experts, quantised: each expert a tensor of its own, the router as it is, the same bits on any way."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.test_compiled import running
from tests.models.tiny import random_model
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli.description import describe, text
from tpcpu.formats import nf4
from tpcpu.parallel.partition import Share
from tpcpu.quantize import quantize

QWEN = {
    "model_type": "qwen2_moe", "hidden_act": "silu", "vocab_size": 131, "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 9,
    "num_experts_per_tok": 3, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192,
    "max_position_embeddings": 128, "torch_dtype": "float32",
}  # fmt: skip
YUAN = {
    "model_type": "yuan", "hidden_act": "silu", "vocab_size": 131, "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "attention_projection_size": 256, "max_position_embeddings": 128, "use_moe": True,
    "moe_config": {"moe_num_experts": 9, "moe_top_k": 3, "ffn_hidden_size": 128}, "torch_dtype": "float32",
}  # fmt: skip
"""Its router has three matrices, and an expert's gate and up are one tensor."""

ROUTERS = {"qwen2_moe": ("1.mlp.gate", "0.mlp.shared_expert_gate"), "yuan": ("1.mlp.gate.query", "0.mlp.gate.value")}


@pytest.fixture(scope="module", params=[QWEN, YUAN], ids=["qwen2_moe", "yuan"])
def folders(request, tmp_path_factory):
    """A random model, and what `quantize` makes of it."""
    config, plain = request.param, tmp_path_factory.mktemp("mixture") / "plain"
    plain.mkdir()
    tiny = random_model(config)
    save_file(tiny.tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    quantize(plain, plain.with_name("nf4"), "nf4")
    return tiny, plain, plain.with_name("nf4")


def test_experts_are_quantised_and_routers_are_not(folders):
    tiny, _, quantised = folders
    with Checkpoint.open(quantised) as checkpoint:
        for weight in tiny.model.program(Share()).weights:
            assert nf4.is_stored(weight.name, checkpoint.tensors) == weight.kind.multiplies
        skipped = checkpoint.config["quantization_config"]["llm_int8_skip_modules"]
        assert {"lm_head", *(f"model.layers.{name}" for name in ROUTERS[tiny.model.model_type])} <= set(skipped)
        found = describe(checkpoint)
    assert found.unsupported == []
    assert found.not_quantized == {}
    # Three of nine experts in each of two layers.
    unread = 2 * 6 * 3 * 128 * 128
    assert found.parameters_per_token == found.parameters - unread
    assert f"{found.parameters:,} parameters, {found.parameters - unread:,} for a token, in" in text(found)


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
def test_any_way_gives_the_same_bits(folders, exact):
    """Quantised before or while loading; a prompt at once, in parts, or token by token."""
    _, plain, quantised = folders
    ids = np.random.default_rng(3).integers(0, 131, 100)
    with running(plain, format="nf4", exact=exact) as runner:
        whole = runner.logits(ids, wanted=list(range(100)))
    with running(quantised, exact=exact) as runner:
        each = [runner.logits([token], at) for at, token in enumerate(ids[:40])]
        each += [runner.logits(ids[at : at + 5], at, list(range(5))) for at in range(40, 100, 5)]
        assert (np.concatenate(each).view(np.uint32) == whole.view(np.uint32)).all()


def test_the_reference_agrees(folders):
    tiny, plain, _ = folders
    ids = np.random.default_rng(4).integers(0, 131, 60)
    wanted = tiny.reference().run(ids, range(60), [0] * 60, range(60))
    with running(plain, exact=True) as runner:
        assert np.abs(runner.logits(ids, wanted=list(range(60))) - wanted).max() < 1e-4
