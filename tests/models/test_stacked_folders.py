"""Folders that hold all experts of a layer in one tensor, quantised: each expert becomes tensors of its own."""

from dataclasses import replace

import numpy as np
import pytest

from tests.models.families import FAMILIES, make_family, text
from tests.models.test_compiled import running
from tpcpu.checkpoint import Checkpoint
from tpcpu.formats import nf4
from tpcpu.quantize import quantize

pytest.importorskip("torch")
pytest.importorskip("transformers")

IDS = text(30)
WANTED = list(range(len(IDS)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Gates and ups have whole blocks of 64, downs do not."""
    family = FAMILIES["gpt_oss"]
    family = replace(family, config=family.config | {"hidden_size": 128})
    return make_family(family, tmp_path_factory.mktemp("stacked"))


def test_as_floats(made, tmp_path):
    quantize(made.folder, tmp_path / "bf16", "bf16")
    with Checkpoint.open(made.folder) as stacked, Checkpoint.open(tmp_path / "bf16") as apart:
        name = "model.layers.1.mlp.experts"
        whole = {each: stacked.array(f"{name}.{each}") for each in ("gate_up_proj", "down_proj", "gate_up_proj_bias")}
        assert np.array_equal(apart.array(f"{name}.3.gate_proj.weight"), whole["gate_up_proj"][3].T[0::2])
        assert np.array_equal(apart.array(f"{name}.3.up_proj.weight"), whole["gate_up_proj"][3].T[1::2])
        assert np.array_equal(apart.array(f"{name}.3.down_proj.weight"), whole["down_proj"][3].T)
        biases = apart.array(f"{name}.3.up_proj.bias").astype(np.float32)
        assert np.array_equal(biases, whole["gate_up_proj_bias"][3][1::2].astype(np.float32))
        assert not [each for each in apart.tensors if each.endswith("gate_up_proj")]
    with running(tmp_path / "bf16", exact=True) as runner:
        assert np.abs(runner.logits(IDS, wanted=WANTED) - made.logits(IDS)).max() < 1e-3


def test_before_or_while_loading(made, tmp_path):
    """The same bits, and every matrix that blocks of 64 divide in NF4."""
    report = quantize(made.folder, tmp_path / "nf4", "nf4")
    assert {name.rpartition(".experts.")[2].partition(".")[2] for name in report.kept if ".experts." in name} == {
        "down_proj.weight"
    }
    with Checkpoint.open(tmp_path / "nf4") as checkpoint:
        assert nf4.is_stored("model.layers.0.mlp.experts.4.up_proj.weight", checkpoint.tensors)
    logits = []
    for folder, form in ((made.folder, "nf4"), (tmp_path / "nf4", None)):
        with running(folder, format=form, lm_head="bf16") as runner:
            logits.append(runner.logits(IDS, wanted=WANTED))
    assert np.array_equal(*(each.view(np.uint32) for each in logits))
