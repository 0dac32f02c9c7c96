"""The widths of the reference job on real ranks: the same answer, token by token, however many share the work.

Two layers of yuan2-102b with a small vocabulary and a head of its own, 1.3 GB of random NF4 weights in a folder. Random
weights may say the same again and again, or leave two tokens level, and equal answers would then show little: both are
looked for.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.configs import PUBLISHED
from tests.e2e.test_commands import YUAN, run
from tests.random_folder import write_nf4

TOKENS = 24
PROMPT = "Once upon a time, there was a little girl who lived near the sea"
LEVEL = 1e-3
"""Logits further apart than this keep their order, whichever way the sums of two jobs round."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Removed at once: pytest keeps what it made for three runs."""
    path = tmp_path_factory.mktemp("widths") / "yuan2-102b-2-layers"
    smaller = {"num_hidden_layers": 2, "vocab_size": 4160, "tie_word_embeddings": False}
    written = write_nf4(path, PUBLISHED["yuan2-102b"] | smaller, YUAN)
    assert written > 1.2e9
    yield path
    shutil.rmtree(path)


def answer(folder: Path, ranks: int) -> dict[str, Any]:
    done = run(
        "generate", "--model", folder, "--prompt", PROMPT, "--exact", "--ranks", str(ranks), "--threads", "1",
        "--temperature", "0", "--max-tokens", str(TOKENS), "--ignore-eos", "--top-logits", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.full
def test_as_many_ranks_as_sockets(folder):
    alone = answer(folder, 1)
    assert len(alone["ids"]) == TOKENS
    assert len(set(alone["ids"])) >= TOKENS // 3, alone["ids"]
    assert min(first - second for (_, first), (_, second) in alone["top_logits"]) > LEVEL
    for ranks in (2, 4):
        given = answer(folder, ranks)
        assert given["ids"] == alone["ids"], ranks
        logits = [largest for (_, largest), _ in given["top_logits"]]
        assert logits == pytest.approx([largest for (_, largest), _ in alone["top_logits"]], abs=LEVEL / 2), ranks
