"""Every family on every rank of a job: logits of prefill and of decode in company, and greedy answers.

The models and what they must give are made on rank 0, by transformers or by the authors' formulas.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.families import FAMILIES, make, text
from tpcpu.engine.engine import Engine, Options
from tpcpu.parallel.announcement import announced
from tpcpu.parallel.communicator import Communicator
from tpcpu.program.batch import Batch

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.mpi

CLOSE = 1e-3
"""Of logits of a few units: what the project promises."""

LONG, SHORT = text(60), text(40, seed=2)
"""Two texts, and how much of each is read before they go on side by side."""
READ = {0: 50, 1: 9}
GREEDY = 32


@dataclass(frozen=True)
class Expected:
    folder: Path
    logits: tuple[Any, Any]
    """Of every token of both texts, (tokens, vocab)."""
    greedy: list[int]
    """What follows the beginning of the second."""


HERE = [name for name in FAMILIES if name not in ("llama-linear", "llama-yarn", "yuan")]
"""All but those that differ in a table of angles only, and one whose trained model `test_models.py` has."""

FEW = ("llama", "baichuan2-13b", "qwen2_moe", "yuan-m32")
"""What is left of them with more ranks than three, which divide in no other way."""


def families_here() -> Sequence[str]:
    companions = announced()
    return FEW if companions and (companions.size or 0) > 3 else HERE


@pytest.fixture(scope="module", params=families_here())
def family(request: pytest.FixtureRequest, communicator: Communicator) -> Iterator[Expected]:
    found = None
    if communicator.is_root:
        folder = Path(tempfile.mkdtemp(prefix="tpcpu-test-"))
        peer = make(request.param, folder)
        ids = SHORT[: READ[1]]
        while len(ids) < READ[1] + GREEDY:
            ids = [*ids, int(peer.logits(ids)[-1].argmax())]
        found = Expected(folder, (peer.logits(LONG), peer.logits(SHORT)), ids[READ[1] :])
    found = communicator.broadcast_object(found)
    yield found
    communicator.barrier()
    if communicator.is_root:
        shutil.rmtree(found.folder)


class Texts:
    """Two sequences of an engine, on rank 0."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sequences = [engine.cache.begin() for _ in range(2)]
        self._lengths = [0, 0]

    def feed(self, *parts: tuple[int, list[int]]) -> Any:
        """Each part: which sequence, and the tokens that go on it; logits (tokens, vocab) of all of them."""
        rows = []
        for number, ids in parts:
            sequence, start = self._sequences[number], self._lengths[number]
            self._lengths[number] += len(ids)
            self._engine.cache.reserve(sequence, self._lengths[number])
            rows.append((ids, start, sequence.state, sequence.pages))
        count = sum(len(ids) for _, ids in parts)
        batch = Batch.build(rows, list(range(count)), candidates=0, vocabulary=self._engine.vocabulary)
        return np.array([each.logits for each in self._engine.step(batch)])

    def restart(self, number: int) -> None:
        self._engine.cache.end(self._sequences[number])
        self._sequences[number], self._lengths[number] = self._engine.cache.begin(), 0


def check(engine: Engine, expected: Expected) -> None:
    texts = Texts(engine)
    for number, ids in enumerate((LONG, SHORT)):
        got = texts.feed((number, ids[: READ[number]]))
        assert np.abs(got - expected.logits[number][: READ[number]]).max() < CLOSE
    for step in range(10):
        at = [READ[number] + step for number in range(2)]
        got = texts.feed((0, [LONG[at[0]]]), (1, [SHORT[at[1]]]))
        wanted = [expected.logits[number][at[number]] for number in range(2)]
        assert np.abs(got - np.array(wanted)).max() < CLOSE
    texts.restart(1)
    ids, last = [], texts.feed((1, SHORT[: READ[1]]))
    while len(ids) < GREEDY:
        ids.append(int(last[-1].argmax()))
        last = texts.feed((1, ids[-1:]))
    assert ids == expected.greedy


def test_logits_and_greedy_answers(family: Expected, communicator: Communicator) -> None:
    # Two ranks read each byte once and pass it on; others take what they need from the mapped files.
    engine = Engine(family.folder, communicator, Options(exact=True, read="shared" if communicator.size == 2 else None))
    try:
        if communicator.is_root:
            try:
                check(engine, family)
            finally:
                engine.release()
        else:
            engine.follow()
    finally:
        engine.close()
