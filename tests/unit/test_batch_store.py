"""Answers that are never lost and never given twice: the journal's torn ends, and a batch broken off anywhere."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_engine import FakeEngine, Tokenizer
from tpcpu.batch import journal
from tpcpu.batch.lock import Lock
from tpcpu.batch.runner import Runner
from tpcpu.batch.source import Source
from tpcpu.batch.store import Store
from tpcpu.engine.scheduler import Scheduler
from tpcpu.errors import NoRoomError, OutputError, PromptError
from tpcpu.sampling import Sampled, SamplingParams

VOCABULARY = 12
DEFAULTS = SamplingParams(max_tokens=24)
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.7, "repetition_penalty": 1.3, "logprobs": True},
    {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "seed": 9, "stop": ["ab", "ca"]},
    {"temperature": 1.2, "top_k": 3, "seed": 4, "ignore_eos": True, "logprobs": True, "top_logprobs": 2},
]


class Letters(Tokenizer):
    """Prompts are lists of ids."""

    def prompt_ids(self, prompt: Any) -> list[int]:
        if not prompt or isinstance(prompt, str):
            raise PromptError("prompt: holds no tokens")
        return list(prompt)


class Silent:
    def show(self, done: int, total: int, tokens: int) -> None:
        assert done <= total
        assert tokens >= 0


def job(source: Source, **settings: Any) -> dict[str, Any]:
    return {"input": source.digest, "model": "m" * 64, "settings": {"context": None, **settings}}


def run(given: Path, output: Path, steps: int | None = None, *, speculate: int = 0, **settings: Any) -> Any:
    """A run that is asked to stop after so many steps."""
    source = Source(given)
    store = None
    try:
        store = Store(output, job(source, **settings), restart=False, wait_seconds=0)
        if store.finished:
            return None
        store.begin(96)
        engine = FakeEngine(vocabulary=VOCABULARY, speculate=speculate)
        scheduler = Scheduler(engine, Letters(VOCABULARY))  # type: ignore[arg-type]
        runner = Runner(
            scheduler, Letters(VOCABULARY), source, store, DEFAULTS,  # type: ignore[arg-type]
            most=4, stop=lambda: steps is not None and engine.steps >= steps, progress=Silent(),
        )  # fmt: skip
        return runner.run()
    finally:
        if store is not None:
            store.close()
        source.close()


def answers(path: Path) -> dict[Any, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def lines_to_answer(path: Path) -> Path:
    """All kinds of sampling, and three lines that cannot be answered."""
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (14, 9)).tolist()
    lines = [json.dumps({"id": i, "prompt": prompt, **KINDS[i % 4]}) for i, prompt in enumerate(prompts)]
    lines[5:5] = ["{", json.dumps({"id": 2, "prompt": [1]}), json.dumps({"id": "long", "prompt": [1] * 97}), ""]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return lines_to_answer(tmp_path / "in.jsonl")


@pytest.fixture
def undisturbed(given: Path, tmp_path: Path) -> dict[Any, Any]:
    outcome = run(given, tmp_path / "whole.jsonl")
    assert (outcome.answers, outcome.errors) == (14, 3)
    problems = [json.loads(line) for line in (tmp_path / "whole.jsonl.errors.jsonl").read_text().splitlines()]
    assert [problem["line"] for problem in problems] == [6, 7, 8]
    assert [problem["id"] for problem in problems] == [None, 2, "long"]
    return answers(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_run_that_is_stopped_again_and_again_gives_the_same(given, undisturbed, tmp_path, speculate):
    """Every step is a place to be stopped at; drafts, sampling, penalties and log probabilities go on as if not."""
    output = tmp_path / "out.jsonl"
    continued = 0
    for _ in range(400):
        outcome = run(given, output, 2, speculate=speculate)
        if outcome is None or not outcome.stopped:
            break
        continued += outcome.continued
    assert answers(output) == undisturbed
    assert continued > 20
    assert run(given, output) is None


def test_every_torn_end_of_every_file_costs_nothing(given, undisturbed, tmp_path):
    """Power is lost while the last bytes of journal, answers and errors are being written."""
    output = tmp_path / "out.jsonl"
    run(given, output, 24)
    files = {path: path.read_bytes() for path in tmp_path.glob("out.jsonl*")}
    ledger = tmp_path / "out.jsonl.journal"
    whole = files[ledger]
    first = whole.index(b"\n") + 1
    for size in [*range(first, len(whole), 23), len(whole)]:
        for path, data in files.items():
            path.write_bytes(data)
        ledger.write_bytes(whole[:size])
        with output.open("ab") as file:
            file.write(b'{"id": 13, "text": "ab", "ids": [1, 2'[: size % 40])
        run(given, output)
        assert answers(output) == undisturbed


def test_a_journal_is_read_up_to_its_first_torn_byte():
    tokens = [Sampled(3, -0.25, ((3, -0.25), (1, -1.5))), Sampled(4, -1.0, ())]
    records = [
        journal.header({"input": "i"}), journal.begun(7, 11), journal.chosen(7, 0, tokens),
        journal.chosen(7, 2, [Sampled(5, -0.5, ())]), journal.sizes({"out": 5}), journal.end({"answers": 1}),
    ]  # fmt: skip
    data = b"".join(map(journal.encode, records))
    ends = np.cumsum([len(journal.encode(record)) for record in records])
    for size in range(len(data) + 1):
        assert len(journal.decode(data[:size])) == int((ends <= size).sum())
    content = journal.read(data)
    assert content.begun[7] == journal.Begun(11, [*tokens, Sampled(5, -0.5, ())])
    assert content.sizes == {"out": 5}
    assert content.end == {"answers": 1}
    for place in range(0, len(data), 3):
        broken = bytearray(data)
        broken[place] ^= 1
        assert len(journal.decode(bytes(broken))) == int((ends <= place).sum())


def test_another_job_is_refused_and_said_how(given, tmp_path):
    output = tmp_path / "out.jsonl"
    run(given, output, 3, exact=False)
    with pytest.raises(OutputError, match=r"exact: False, now True.*--restart"):
        run(given, output, exact=True)
    given.write_text(given.read_text() + '\n{"id": "more", "prompt": [1]}')
    with pytest.raises(OutputError, match="--input: other contents"):
        run(given, output, exact=False)


def test_what_nobody_began_or_something_changed_is_refused(given, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(OutputError, match="--restart"):
        run(given, output)
    assert output.read_text() == "mine\n"
    output.unlink()
    run(given, output)
    output.write_bytes(output.read_bytes()[:100])
    with pytest.raises(OutputError, match="took answers away"):
        run(given, output)


def test_a_disk_that_is_full_tears_nothing(given, undisturbed, tmp_path):
    """The limit of a file's size stands for the disk's; the child process has it."""
    output = tmp_path / "out.jsonl"
    code = (
        "import resource, sys; from pathlib import Path; from tests.unit.test_batch_store import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, given, output], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert NoRoomError.__name__ in done.stderr
    assert "no room left" in done.stderr
    assert all(line.endswith("\n") for line in output.read_text().splitlines(keepends=True))
    run(given, output)
    assert answers(output) == undisturbed


def test_one_job_per_output_names_its_holder(tmp_path):
    path = tmp_path / "out.lock"
    code = (
        "import sys; from pathlib import Path; from tpcpu.batch.lock import Lock\n"
        "held = Lock(Path(sys.argv[1]), 'out', 0); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"process {child.pid} on "):
            Lock(path, "out", 0.1)
        child.kill()
        child.wait(10)
        Lock(path, "out", 5).release()
        assert not path.exists()
    finally:
        child.kill()
        child.communicate()
