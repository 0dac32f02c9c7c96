"""Every family in the numpy reference: against transformers or the authors' formulas, and key by key."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.models.families import FAMILIES, Made, make, text
from tests.models.tiny import Tiny
from tpcpu.checkpoint import Checkpoint
from tpcpu.errors import ConfigError
from tpcpu.formats import mxfp4
from tpcpu.models import ARCHITECTURES, read_config
from tpcpu.models.keys import IGNORED
from tpcpu.parallel.partition import Share

pytest.importorskip("torch")
pytest.importorskip("transformers")

CLOSE = 1e-3
"""Of logits of a few units: what the project promises."""

HEARD = 1e-2
"""What a key that changes the mathematics changes some logit by at least."""


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Made]:
    return request.param, make(request.param, tmp_path_factory.mktemp(request.param))


def read(made: Made, **changed: Any) -> Tiny:
    """The saved tensors under the saved config, some of its keys changed."""
    with Checkpoint.open(made.folder) as checkpoint:
        model = read_config(checkpoint.config | changed)
        checkpoint.take_apart(model.stacks)
        names = [name for name in checkpoint.tensors if not name.endswith(".scales")]
        return Tiny(model, {name: _values(checkpoint, name) for name in names}, {})


def _values(checkpoint: Checkpoint, name: str) -> Any:
    values = checkpoint.array(name)
    if not mxfp4.is_stored(name, checkpoint.tensors):
        return values
    return mxfp4.dequantize(values, checkpoint.array(mxfp4.scales_name(name)))


def run(tiny: Tiny, ids: list[int], size: int = 1) -> Any:
    every = range(len(ids))
    return tiny.reference(size).run(ids, every, [0] * len(ids), every)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_logits(made: tuple[str, Made], size: int) -> None:
    ids = text(40)
    assert np.abs(run(read(made[1]), ids, size) - made[1].logits(ids)).max() < CLOSE


def other(value: Any) -> Any:
    """Something else of the same type, that makes sense where the first does."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    if isinstance(value, float):
        return value * 1e4 if value < 1e-3 else value * 2
    if isinstance(value, str):
        return f"{value}_of_tomorrow"
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return [item + 1 for item in value] or [0]
    return [other(item) for item in value] if isinstance(value[0], float) else value[::-1]


def changes(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key, those inside of objects one after another, and the outermost object with another value for it."""
    for key, value in values.items():
        if isinstance(value, dict):
            for inner, changed in changes(value):
                yield f"{key}.{inner}", value | {inner.partition(".")[0]: changed}
        elif key not in IGNORED and value is not None:
            yield key, other(value)


def test_every_key_is_heard_or_refused(made: tuple[str, Made]) -> None:
    """Keys that transformers or the authors write, those inside of others too, one after another with another value."""
    name, model = made
    ids = text(40)
    config = json.loads((model.folder / "config.json").read_text())
    whole = run(read(model), ids)
    unheard = []
    for key, value in changes(config):
        try:
            changed = read(model, **{key.partition(".")[0]: value})
        except ConfigError:
            continue
        shapes = {weight.name: weight.full_shape for weight in changed.model.program(Share()).weights}
        if shapes != {stored: values.shape for stored, values in changed.tensors.items()}:
            continue
        if np.abs(run(changed, ids) - whole).max() < HEARD:
            unheard.append(key)
    # What stretches only texts longer than those that are read here.
    beyond = {"rope_parameters.factor"} if name == "llama-dynamic" else set()
    assert set(unheard) <= NEVER_HEARD | beyond


NEVER_HEARD = {
    # Of training.
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    # Masks of training, and of a path that plain causal attention replaces.
    "causal_mask", "use_flash_attention", "reset_attention_mask", "reset_position_ids", "use_loss_mask",
    # How long a text may be.
    "max_position_embeddings", "original_max_position_embeddings", "model_max_length", "seq_length",
    "rope_parameters.long_factor",
    # How, and how precisely, the authors compute the same.
    "pretraining_tp", "use_flash_attn", "bf16", "original_rope", "apply_query_key_layer_scaling", "bias_dropout_fusion",
    "attention_softmax_in_fp32", "fp32_residual_connection", "params_dtype",
    # Layers behind the last one, which guess further tokens.
    "num_nextn_predict_layers",
    # Where layer_types says it.
    "_sliding_window_pattern", "sliding_window_pattern", "max_window_layers",
    # What tensors say of themselves.
    "quantization_config.quant_method", "quantization_config.modules_to_not_convert",
    # Within seq_length.
    "use_dynamic_ntk", "use_logn_attn",
}  # fmt: skip


def test_every_architecture_has_a_model() -> None:
    assert {family.model_type for family in FAMILIES.values()} == set(ARCHITECTURES)
