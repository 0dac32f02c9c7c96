"""`tpcpu batch` as a person runs it: right answers, and none lost or given twice whatever ends it."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.batches import (
    DATA,
    SECONDS,
    YUAN,
    Job,
    answers_of,
    command,
    in_order,
    journal_of,
    problems_of,
    result_of,
    tokens_on_disk,
    undisturbed_job,
    wait_for_tokens,
    write_prompts,
)
from tests.e2e.processes import environment, eventually, family
from tpcpu import LLM, Completion, SamplingParams

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.9, top_p=0.9, seed=7)
QUESTION = [{"role": "user", "content": "How many legs have two cats?"}]
ASKED: dict[Any, tuple[Any, SamplingParams]] = {
    "greedy": ("Once upon a time", GREEDY),
    7: ("The big dog", GREEDY),
    "chat": (QUESTION, GREEDY),
    "ids": ([5, 9, 300, 17], GREEDY),
    "drawn": ("Once upon a time", DRAWN),
    "stop": ("Once upon a time", SamplingParams(max_tokens=60, stop=("a",))),
    "openai": (QUESTION, GREEDY),
    "openai text": ("Lily had", DRAWN),
}
BODY = {"model": "any", "ignore_eos": True, "temperature": 0, "user": "somebody"}
LINES: list[Any] = [
    {"id": "greedy", "prompt": "Once upon a time"},
    "{",
    {"id": 7, "prompt": "The big dog", "temperature": 0.0},
    {"id": "chat", "messages": QUESTION},
    {"id": "greedy", "prompt": "again"},
    "",
    {"id": "ids", "prompt": [5, 9, 300, 17]},
    {"id": "misspelt", "prompt": "Once", "temprature": 1},
    {"id": "drawn", "prompt": "Once upon a time", "temperature": 0.9, "top_p": 0.9, "seed": 7},
    {"id": "hot", "prompt": "Once", "temperature": -1},
    {"id": "stop", "prompt": "Once upon a time", "max_tokens": 60, "stop": "a", "ignore_eos": False},
    {"custom_id": "openai", "method": "POST", "url": "/v1/chat/completions",
     "body": {**BODY, "messages": QUESTION, "max_completion_tokens": 20}},
    {"custom_id": "openai text", "method": "POST", "url": "/v1/completions",
     "body": {**BODY, "prompt": "Lily had", "temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 20}},
    {"id": "long", "prompt": [5] * 513},
    {"prompt": "nobody's"},
]  # fmt: skip
PROBLEMS = [
    (2, None, "not JSON"), (5, "greedy", "earlier line"), (8, "misspelt", "is temperature meant"),
    (10, "hot", "temperature"), (14, "long", "513"), (15, None, "id: missing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[Any, Completion]:
    """What LLM.generate answers, one prompt at a time."""
    with LLM(YUAN, ranks=1, exact=True) as llm:
        return {name: llm.generate([prompt], params)[0] for name, (prompt, params) in ASKED.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return undisturbed_job(tmp_path_factory.mktemp("undisturbed"), 2.0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_answers_are_those_of_generate_and_bad_lines_stop_nothing(tmp_path, expected, ranks):
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in LINES))
    flags = ["--exact", "--max-tokens", "20", "--ignore-eos", "--max-batch", "3"]
    with family(command(given, output, ranks, *flags), tmp_path) as started:
        result = result_of(started)
    found = answers_of(output)
    assert sorted(map(str, found)) == sorted(map(str, expected))
    for name, wanted in expected.items():
        line = next(n for n, each in enumerate(LINES, 1) if isinstance(each, dict)
                    and name in (each.get("id"), each.get("custom_id")))  # fmt: skip
        answer = found[name]
        assert answer["line"] == line
        assert answer["prompt_tokens"] == len(wanted.prompt_ids)
        # drawn tokens are promised for one number of ranks only: sums are added in another order
        if ranks == 1 or ASKED[name][1].greedy:
            assert answer["ids"] == wanted.ids, name
            assert (answer["text"], answer["finish_reason"]) == (wanted.text, wanted.finish_reason)
    assert found["openai"]["response"]["body"]["choices"][0]["message"]["content"] == found["chat"]["text"]
    problems = in_order(problems_of(output))
    assert [(each["line"], each["id"]) for each in problems] == [(line, name) for line, name, _ in PROBLEMS]
    for each, (_, _, words) in zip(problems, PROBLEMS, strict=True):
        assert words in each["error"], each
    assert (result["answers"], result["errors"], result["finished"]) == (len(ASKED), len(PROBLEMS), True)
    assert result["output"] == str(output)
    assert result["prompt_tokens"] == sum(len(answer.prompt_ids) for answer in expected.values())


def test_killed_at_any_moment_it_goes_on_in_the_middle_of_answers(tmp_path, undisturbed):
    """All of its processes at once, as when the power fails, and at last left alone."""
    given, wanted = undisturbed.given, undisturbed.answers
    output = tmp_path / "out.jsonl"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    safe = 0
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with family(command(given, output, 2), folder) as started:
            wait_for_tokens(started, output, safe + 100)
            time.sleep(draw.uniform(0, 0.3))
            started.kill()  # returns when they are gone
            age = time.time() - journal_of(output).stat().st_mtime
        assert age < 1.0, "the journal is written at least once a second"
        safe = tokens_on_disk(output)
    folder = tmp_path / "last"
    folder.mkdir()
    with family(command(given, output, 2), folder) as started:
        result = result_of(started)
    assert answers_of(output) == wanted
    assert result["continued"] > 0
    assert result["new_tokens"] == undisturbed.tokens - safe, "what the journal holds is not computed again"
    assert problems_of(output) == []


def test_what_writing_takes_is_told_and_little(tmp_path):
    given, output = write_prompts(tmp_path / "in.jsonl", 20, 150), tmp_path / "out.jsonl"
    with family(command(given, output, 1), tmp_path) as started:
        result = result_of(started)
    assert result["new_tokens"] == 20 * 150
    assert 0 < result["journal_seconds"] < 0.01 * result["seconds"]


@pytest.mark.parametrize(
    ("number", "launcher"),
    [(signal.SIGTERM, ()), (signal.SIGUSR1, ("mpiexec", "-n", "2")), (signal.SIGINT, ())],
    ids=["SIGTERM twice", "SIGUSR1 to mpiexec", "SIGINT"],
)
def test_a_signal_stops_it_and_it_goes_on(tmp_path, undisturbed, number, launcher):
    given, wanted = undisturbed.given, undisturbed.answers
    output = tmp_path / "out.jsonl"
    code = 130 if number == signal.SIGINT else 75
    arguments = command(given, output, 2)
    with family([*launcher, *arguments], tmp_path) as started:
        wait_for_tokens(started, output, 100)
        started.process.send_signal(number)
        if number == signal.SIGTERM:
            started.process.send_signal(number)
        result = result_of(started, code)
    assert (result["stopped"], result["finished"]) == (True, False)
    safe = tokens_on_disk(output)
    assert result["new_tokens"] == safe, "all that was computed is on disk"
    if number == signal.SIGINT:
        return  # the rest is as with the others
    folder = tmp_path / "again"
    folder.mkdir()
    with family(arguments, folder) as started:
        result = result_of(started)
    assert answers_of(output) == wanted
    assert result["new_tokens"] == undisturbed.tokens - safe


def test_a_signal_before_the_ranks_are_ready_leaves_everything_for_the_next_run(tmp_path):
    """Imports, MPI, compiled kernels, weights: whatever is broken off, the code says to run it again."""
    given, output = write_prompts(tmp_path / "in.jsonl", 3, 10), tmp_path / "out.jsonl"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for number, (ranks, after) in enumerate([(1, 0.6), (2, 0.8), (2, 1.8)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with family(command(given, output, ranks), folder) as started:
            eventually(lambda: _catches(started.process.pid, signal.SIGUSR1), 30, lambda: "no handler")
            time.sleep(draw.uniform(0, after))
            started.process.send_signal(signal.SIGUSR1)
            started.process.send_signal(signal.SIGTERM)
            code, _, err = started.end()
            assert code in (0, 75), err  # 0: a quick machine
            assert "Traceback" not in err
            assert "error" not in err, err
            started.assert_nothing_left()
        assert not output.with_name("out.jsonl.lock").exists()
    folder = tmp_path / "last"
    folder.mkdir()
    with family(command(given, output, 1), folder) as started:
        assert result_of(started)["answers"] == 3


def test_a_full_disk_loses_nothing(tmp_path, undisturbed):
    """In a mount namespace of the job's own, which takes the small disk with it when it ends."""
    given, wanted = undisturbed.given, undisturbed.answers
    # room for half of the answers, and a page each for journal, its successor and lock
    answered = sum(len(json.dumps(answer)) for answer in wanted.values())
    room = 4 * (3 + round(answered / 2 / 4096))
    job = " ".join(map(str, command(given, Path("disk/out.jsonl"), 2, "--max-batch", "3")))
    script = f"""
set -e
mkdir disk && mount -t tmpfs -o size={room}k none disk
code=0; {job} || code=$?
[ $code = 1 ] && wc -l disk/out.jsonl >&2
mount -o remount,size=16m disk
{job}
cp disk/* .
"""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    with family(["unshare", *as_root, "--mount", "bash", "-c", script], tmp_path) as started:
        code, out, err = started.end()
        started.assert_nothing_left()
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if line.startswith("tpcpu: error: "))
    told = re.search(r"disk/out\.jsonl\S*: no room left \(.*\): (\d+) answers are safe; make room and run", line)
    assert told, line
    assert f"\n{told[1]} disk/out.jsonl\n" in err
    assert 0 < int(told[1]) < len(wanted)
    assert json.loads(out)["resumed"] == int(told[1])
    assert answers_of(tmp_path / "out.jsonl") == wanted


def test_one_job_at_a_time_writes_an_output(tmp_path):
    given, output = write_prompts(tmp_path / "in.jsonl", 200, 200), tmp_path / "out.jsonl"
    with family(command(given, output, 1), tmp_path) as started:
        wait_for_tokens(started, output, 1)
        done = run(*command(given, output, 1, "--fault-timeout", "1"))
        assert done.returncode == 2
        holder = f"process {started.process.pid} on {os.uname().nodename}"
        wanted = f"tpcpu: error: {output} is being written by {holder} (waited 1 s); wait for its end, or end it\n"
        assert done.stderr == wanted
        assert started.process.poll() is None
        started.process.send_signal(signal.SIGTERM)
        result_of(started, 75)
        assert not output.with_name("out.jsonl.lock").exists()


def test_what_would_change_answers_is_refused(tmp_path):
    given, output = write_prompts(tmp_path / "in.jsonl", 1, 3), tmp_path / "out.jsonl"
    other = write_prompts(tmp_path / "other.jsonl", 2, 3)
    assert run(*command(given, output, 1)).returncode == 0
    before = output.read_bytes()
    for told, arguments in (
        ("--input: other contents", command(other, output, 1)),
        ("--model: other contents", command(given, output, 1, "--model", DATA / "llama-tiny")),
        ("exact: False, now True", command(given, output, 1, "--exact")),
        ("temperature: 0.0, now 0.5", command(given, output, 1, "--temperature", "0.5")),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(f"tpcpu: error: {output} was begun as another job ({told}"), done.stderr
        assert done.stderr.count("\n") == 1
        assert output.read_bytes() == before
    # neither ranks nor company are part of the job
    done = run(*command(given, output, 2, "--max-batch", "1"))
    assert (done.returncode, json.loads(done.stdout)["answers"]) == (0, 1)
    assert run(*command(other, output, 1, "--restart")).returncode == 0
    assert set(answers_of(output)) == {"r0", "r1"}


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        arguments, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=SECONDS,
        check=False,
    )  # fmt: skip


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\t([0-9a-f]+)$", status, re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)
