"""Jobs of `tpcpu batch` for the tests: their input, their command line, and what came of them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.processes import Family, environment, eventually
from tpcpu.batch import journal

DATA = Path(__file__).parents[1] / "data"
YUAN = DATA / "yuan-tiny"
SECONDS = 240.0  # the first program on a machine compiles the kernels
PROMPTS = ("Once upon a time", "The big dog", "Lily had a red ball.", "One day, a cat", "Tom and Sam went to the park")


def write_prompts(path: Path, count: int, tokens: int, **sampling: Any) -> Path:
    """So many lines whose answers have so many tokens each; every prompt is another."""
    lines = [
        {"id": f"r{n}", "prompt": f"{PROMPTS[n % 5]} {n}", "max_tokens": tokens, "ignore_eos": True, **sampling}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(given: Path, output: Path, ranks: int, *flags: str | Path) -> list[str | Path]:
    """The command line of a job; its results are on standard output."""
    job = ["--ranks", str(ranks), "--input", given, "--output", output]
    model = [] if "--model" in flags else ["--model", YUAN]
    return [sys.executable, "-m", "tpcpu", "batch", *model, *job, "--json", *flags]


@dataclass(frozen=True)
class Job:
    """An input, and its answers when nothing disturbs."""

    given: Path
    answers: dict[Any, dict[str, Any]]

    @property
    def tokens(self) -> int:
        return sum(len(answer["ids"]) for answer in self.answers.values())


def undisturbed_job(folder: Path, seconds: float) -> Job:
    """Greedy and drawn answers on two ranks, as many as take this machine so long at least."""
    given, count = folder / "in.jsonl", 12
    while True:
        drawn = write_prompts(given, count, 150, temperature=0.8, seed=5).read_text().splitlines(keepends=True)
        greedy = write_prompts(given, count, 150).read_text().splitlines(keepends=True)
        given.write_text("".join(greedy[::2] + drawn[1::2]))
        output = folder / f"{count}.jsonl"
        done = subprocess.run(
            command(given, output, 2), env=environment(), capture_output=True, text=True, timeout=SECONDS, check=True
        )
        took = json.loads(done.stdout)["seconds"]
        if took >= seconds:
            return Job(given, answers_of(output))
        count = int(count * max(1.2 * seconds / took, 1.5))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of a file in which no line is torn."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def answers_of(path: Path) -> dict[Any, dict[str, Any]]:
    """By id; no answer is there twice."""
    lines = lines_of(path)
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines), [line["id"] for line in lines]
    return found


def problems_of(output: Path) -> list[dict[str, Any]]:
    """The lines that have no answer."""
    path = output.with_name(output.name + ".errors.jsonl")
    return lines_of(path) if path.exists() else []


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def tokens_on_disk(output: Path) -> int:
    """Of finished answers, and of those that the journal goes on with."""
    if not journal_of(output).exists():
        return 0
    text = output.read_bytes()
    whole = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    done = {answer["line"] for answer in whole}
    begun = journal.read(journal_of(output).read_bytes()).begun
    open_tokens = sum(len(answer.answered) for line, answer in begun.items() if line not in done)
    return sum(len(answer["ids"]) for answer in whole) + open_tokens


def wait_for_tokens(started: Family, output: Path, count: int) -> None:
    """Until so many are on disk."""

    def reached() -> bool:
        if started.process.poll() is not None:
            raise AssertionError(f"ended before {count} tokens: {started.end()}")
        return tokens_on_disk(output) >= count

    eventually(reached, SECONDS, lambda: f"{count} tokens were not reached")


def result_of(started: Family, code: int = 0) -> dict[str, Any]:
    """The JSON object of a job that ended with this code and left nothing behind."""
    found, out, err = started.end()
    assert found == code, err
    started.assert_nothing_left()
    assert "Traceback" not in err, err
    # a launcher may have told before of the signal that it passes on
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def in_order(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By number of line."""
    return sorted(found, key=lambda entry: entry["line"])
