"""Losses on real text: what `eval` says, against published figures, against plain torch, and between arithmetics."""

import json
from pathlib import Path

import pytest

from tests.e2e.test_commands import run
from tests.shared import DATA
from tpcpu import LLM
from tpcpu.cli.eval import read_documents
from tpcpu.quantize import quantize
from tpcpu.text import load_tokenizer

TRAINED = ("yuan-tiny", "llama-tiny")
DOCUMENTS = read_documents(DATA / "heldout.txt", "<eod>")
WINDOW = 256


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """The trained models as `quantize` writes them, by name."""
    folder = tmp_path_factory.mktemp("quantised")
    for name in TRAINED:
        quantize(DATA / name, folder / name, "nf4")
    return folder


def losses(folder: Path, documents: list[str] = DOCUMENTS, **settings: object) -> tuple[list[float], list[int]]:
    """Loss and scored tokens of each document."""
    with LLM(folder, ranks=1, **settings) as llm:
        scores = llm.score(documents, WINDOW)
    return [score.nll for score in scores], [score.tokens for score in scores]


@pytest.mark.parametrize(("name", "ranks"), [("yuan-tiny", "1"), ("llama-tiny", "2")])
def test_eval_says_the_published_loss(name, ranks):
    flags = ("--text", DATA / "heldout.txt", "--format", "bf16", "--exact", "--ranks", ranks, "--json")
    done = run("eval", "--model", DATA / name, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    heldout = json.loads((DATA / name / "reference.json").read_text())["heldout"]
    assert answer["nll_per_token"] == pytest.approx(heldout["mean_nll_nats_per_token"], abs=1e-3)
    assert answer["tokens"] == heldout["scored_tokens"]
    assert 0.03 < answer["standard_error"] < 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_nf4_has_the_loss_of_bitsandbytes_weights_in_torch(quantised, name):
    """All documents: tests/bench/loss_table.py."""
    from tests.e2e import torch_peer

    documents = DOCUMENTS[:8]
    folder = quantised / name
    tokenizer = load_tokenizer(folder, json.loads((folder / "config.json").read_text()))
    theirs = torch_peer.losses(folder, [tokenizer.encode(document)[:WINDOW] for document in documents])
    ours, tokens = losses(folder, documents, exact=True, lm_head="bf16")
    for our, their, count in zip(ours, theirs, tokens, strict=True):
        assert our / count == pytest.approx(their / count, abs=1e-3)
    assert sum(ours) / sum(tokens) == pytest.approx(sum(theirs) / sum(tokens), abs=1e-4)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_default_arithmetic_has_the_loss_of_exact_arithmetic(name, form):
    by_default, tokens = losses(DATA / name, format=form)
    slowly, _ = losses(DATA / name, format=form, exact=True)
    assert by_default != slowly
    assert sum(by_default) / sum(tokens) == pytest.approx(sum(slowly) / sum(tokens), abs=2e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_a_cache_of_int8_has_the_loss_of_floats(name):
    """Keys and values of 8 bits beside the unrounded ones, all else exact."""
    rounded, tokens = losses(DATA / name, exact=True, kv_cache="int8")
    unrounded, _ = losses(DATA / name, exact=True)
    assert rounded != unrounded
    assert sum(rounded) / sum(tokens) == pytest.approx(sum(unrounded) / sum(tokens), abs=2e-3)
