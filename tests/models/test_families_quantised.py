"""Every family in 4 bits, compiled, against the reference: in 8-bit arithmetic and in floats, prompts and what follows.

The models are those of `families.py` in sizes that blocks of 64 divide, with random weights of our own: what a family
is was tested there, and here is how its parts meet quantised weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.families import FAMILIES, text
from tests.models.test_compiled import running, stored_as
from tests.models.tiny import Tiny, random_model
from tpcpu.kernels.isa import available, selected
from tpcpu.parallel.partition import Share
from tpcpu.program.operations import Route

SIZES = {
    "hidden_size": 192, "intermediate_size": 192, "ffn_hidden_size": 192, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128, "head_dim": 32, "kv_channels": 32, "attention_projection_size": 384,
    "q_lora_rank": 64, "kv_lora_rank": 128, "v_head_dim": 32,
}  # fmt: skip
HERE = [
    name for name, family in FAMILIES.items() if (name == "llama" or not name.startswith("llama")) and not family.mxfp4
]
"""All but those that differ in a table of angles only, or in what they are stored as."""

TEXTS = [text(6, seed=seed) for seed in range(6)]
PROMPT = 5
"""Tokens of each that are read at once."""

CLOSE = 1e-5
"""Of the largest logit: float32 against float32 with sums in another order."""

TURNED, CHOSEN = 4e-2, 0.3
"""The same where the last bit has turned a rounding to 8 bits, and with it others behind it; or another expert."""

ALIKE = 0.6
"""The least part of all tokens in which none has: one of twenty or fewer has, and those after it follow."""


def aligned(config: dict[str, Any]) -> dict[str, Any]:
    """The config in other sizes."""
    made = {key: value if value is None else SIZES.get(key, value) for key, value in config.items()}
    made |= {key: aligned(value) for key, value in made.items() if isinstance(value, dict)}
    # Twice as wide heads have twice as many pairs; the first Qwen says twice what its gate has.
    made |= {key: value * 2 for key, value in made.items() if key in ("short_factor", "long_factor")}
    if made.get("model_type") == "qwen":
        made["intermediate_size"] = 384
    return made


@pytest.fixture(scope="module", params=HERE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    family = FAMILIES[request.param]
    config = aligned(family.config) | {"model_type": family.model_type, "torch_dtype": "float32"}
    tiny, folder = random_model(config, seed=3), tmp_path_factory.mktemp(request.param)
    save_file(tiny.tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tiny, folder


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
def test_four_bits_against_the_reference(made: tuple[Tiny, Path], exact: bool) -> None:
    tiny, folder = made
    # Rows that are divided by their lengths are so before they are rounded, where the reference divides what it gets.
    plain = any(weight.unit_rows for weight in tiny.model.program(Share()).weights)
    weights = stored_as(tiny, "nf4", None if plain else "int8")
    reference = tiny.reference(weights=weights, arithmetic="exact" if exact else "int8")
    errors = []
    with running(folder, format="nf4", exact=exact, lm_head="bf16" if plain else None) as runner:
        for ids in TEXTS:
            wanted = reference.run(ids, range(6), [0] * 6, range(6))
            rows = [runner.logits(ids[:PROMPT], wanted=list(range(PROMPT))), runner.logits(ids[PROMPT:], PROMPT)]
            errors.append(np.abs(np.concatenate(rows) - wanted).max(axis=1) / np.abs(wanted).max())
            runner.restart()
    every = np.concatenate(errors)
    if exact:
        assert every.max() < CLOSE
    else:
        assert np.mean(every < CLOSE) > ALIKE
        mixture = any(isinstance(operation, Route) for operation in tiny.model.program(Share()).operations)
        assert every.max() < (CHOSEN if mixture else TURNED)


@pytest.mark.full
@pytest.mark.parametrize("isa", [isa.name for isa in available() if isa is not selected()])
def test_under_another_instruction_set(isa: str) -> None:
    environment = {**os.environ, "TPCPU_ISA": isa}
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "four_bits", __file__)
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert f"{2 * len(HERE)} passed" in run.stdout.splitlines()[-1]
