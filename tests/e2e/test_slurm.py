"""The shipped batch files under a real SLURM on this machine, and srun: results, limits, requeueing.

The cluster is `tests/slurm.py`'s. Its nodes are smaller than the files' sockets, so tests give sbatch other counts
before the file's name, as a user would; the files are submitted as they are shipped.
"""

import faulthandler
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.configs import PUBLISHED
from tests.e2e.processes import PROJECT, environment, eventually
from tests.flavours import flavour
from tests.slurm import Cluster, cluster, missing
from tpcpu import LLM, SamplingParams

DATA = PROJECT / "tests" / "data"
YUAN = DATA / "yuan-tiny"
FILES = PROJECT / "launch" / "slurm"
STORY = json.loads((YUAN / "reference.json").read_text())["cases"][0]
TOKENS = 100
SECONDS = 240.0  # the first program on a machine compiles the kernels


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two CPUs, on this machine."""
    assert not missing(), f"{missing()} are not installed; launch/test.sh installs them"
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder, nodes=2) as running:
        yield running
    assert running.processes() == []


@pytest.fixture(scope="module")
def speed() -> float:
    """Tokens a second, as jobs are to take so many seconds on any machine, with signals in between."""
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM(YUAN, ranks=1, exact=True) as llm:
        llm.generate(["Once"], params)
        begin = time.monotonic()
        llm.generate(["Once"] * 16, params)
        return 16 * 40 / (time.monotonic() - begin)


def prompts(path: Path, count: int) -> Path:
    """All the same, the first two with short answers."""
    lines = [
        {"id": f"r{n}", "prompt": STORY["prompt"], "max_tokens": TOKENS if n > 1 else 8, "ignore_eos": True}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(*paths: Path) -> dict[str, str]:
    """Every answer by its id; no id twice."""
    answers = [line for path in paths for line in map(json.loads, path.read_text().splitlines())]
    found = {answer["id"]: answer["text"] for answer in answers}
    assert len(found) == len(answers)
    return found


def succeeded(slurm: Cluster, job: str, log: Path) -> None:
    shown = slurm.wait(job, seconds=SECONDS)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()


PMI_FAILED = "mpi/pmi2: invalid client request"
"""SLURM's plugin at times loses the beginning of what MPICH sends it, and ranks of two nodes do not meet. What has
failed so is submitted again, as a user would, and goes on."""


class Sent:
    """A batch file that was submitted as it is shipped, for prompts that are all the same."""

    def __init__(self, slurm: Cluster, file: str, name: str, tokens: float, *flags: str, **environ: str) -> None:
        """`name` is of its folder; so many `tokens` are asked for."""
        self._slurm, self._file, self._flags = slurm, file, flags
        self.count = max(int(tokens / TOKENS), 8)
        self.folder = slurm.folder / name
        self.folder.mkdir()
        given = prompts(self.folder / "in.jsonl", self.count)
        self.log = self.folder / "log"
        self._environ = environment(MODEL=str(YUAN), INPUT=str(given), OUTPUT=str(self.folder / "out"), **environ)
        self.submit()

    def submit(self) -> None:
        self.job = self._slurm.submit(*self._flags, f"--output={self.log}", FILES / self._file, environ=self._environ)

    @property
    def answers(self) -> list[Path]:
        """`out`, or the files of the array's tasks in it."""
        out = self.folder / "out"
        return sorted(out.glob("answers-*.jsonl")) if out.is_dir() else [out]

    def work(self) -> None:
        """Returns when there are answers, and more to come."""
        eventually(lambda: any(path.is_file() and path.stat().st_size for path in self.answers), SECONDS, self.told)

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"

    def texts(self) -> set[str]:
        """Those of all answers, of which none is missing."""
        found = texts(*self.answers)
        assert set(found) == {f"r{n}" for n in range(self.count)}
        return set(found.values())


def test_every_file_goes_back_to_the_queue_when_warned_and_finishes(slurm, speed):
    one = Sent(slurm, "one-node.sbatch", "one", 3 * speed, "--ntasks-per-node=2")
    array = Sent(slurm, "array.sbatch", "array", 5 * speed, "--array=1-2", "--ntasks-per-node=1")
    one.work()
    array.work()
    # What --signal=B:USR1@120 sends when time is up.
    slurm.command("scancel", "--signal=USR1", "--batch", one.job)
    slurm.command("scancel", "--signal=USR1", "--batch", f"{array.job}_1")
    nodes = Sent(slurm, "nodes.sbatch", "nodes", 2 * speed, "--ntasks-per-node=1")
    nodes.work()
    slurm.command("scancel", "--signal=USR1", "--batch", nodes.job)
    for sent, job in ((one, one.job), (array, f"{array.job}_1"), (array, f"{array.job}_2"), (nodes, nodes.job)):
        shown, told = slurm.wait(job, seconds=SECONDS), sent.told()
        if shown["JobState"] == "FAILED" and PMI_FAILED in told:
            sent.submit()
            shown = slurm.wait(sent.job, seconds=SECONDS) | {"Restarts": shown["Restarts"]}
            told += sent.told()
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), told
        assert shown["Restarts"] == ("0" if job.endswith("_2") else "1"), told
        assert "goes back to the queue" in told
        assert "going on with" in told
    assert slurm.show(nodes.job)["NumNodes"] == "2"
    odd_lines, even_lines = map(texts, array.answers)
    assert set(odd_lines) == {f"r{n}" for n in range(0, array.count, 2)}
    assert len(even_lines) == array.count // 2
    short, long = sorted(one.texts() | array.texts() | nodes.texts(), key=len)
    assert long.startswith(short)


def test_a_cancelled_job_goes_on_when_submitted_again(slurm, speed):
    """scancel's TERM, which preemption sends too: the state is written, and the job stays away."""
    sent = Sent(slurm, "nodes.sbatch", "cancelled", 2 * speed, "--ntasks-per-node=1", LAUNCH="mpiexec")
    sent.work()
    slurm.command("scancel", sent.job)
    shown = slurm.wait(sent.job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0"), sent.told()
    assert "goes back to the queue" not in sent.told()
    assert len(texts(*sent.answers)) < sent.count
    sent.submit()
    succeeded(slurm, sent.job, sent.log)
    assert "going on with" in sent.told()
    assert len(sent.texts()) == 2


def test_srun_starts_the_driver(slurm):
    arguments = ["--ntasks=2", "--cpu-bind=none", "python", PROJECT / "launch" / "driver.py", YUAN]
    done = slurm.attempt("srun", "--mpi=pmi2", *arguments, environ=environment(), seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert "refused: prompt: holds no tokens" in done.stdout


@pytest.mark.full
@pytest.mark.flavours
def test_srun_starts_the_ranks_of_each_mpi(slurm):
    """Those of Open MPI speak PMIx, for which Debian's SLURM wants `libpmix-dev`."""
    mpi = "pmix" if flavour() == "openmpi" else "pmi2"
    command = [sys.executable, "-m", "tpcpu", "generate", "--model", YUAN, "--prompt", STORY["prompt"], "--exact"]
    srun = ["srun", f"--mpi={mpi}", "--ntasks=2", "--cpu-bind=none", *command, "--max-tokens", "8", "--json"]
    done = slurm.attempt(*srun, environ=environment(), seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (len(said["ids"]), "slow_ranks" in said) == (8, True)  # which is told of several ranks only


def test_srun_without_mpi_is_told_the_mend(slurm):
    arguments = ["tpcpu", "generate", "--model", YUAN, "--prompt", "Once", "--max-tokens", "2"]
    done = slurm.attempt("srun", "--mpi=none", "--ntasks=2", *arguments, environ=environment(), seconds=SECONDS)
    assert done.returncode == 2
    assert "try srun --mpi=pmi2" in done.stderr
    assert "Traceback" not in done.stderr


LIMITS = """#!/bin/bash
python -c '
from tpcpu.parallel.limits import available
from tpcpu.parallel.topology import Topology
topology = Topology.detect()
limits = topology.limits
print(limits.slurm_cpus, limits.memory >> 20, len(topology.cores_for(0, 1)), available(held=100 << 20))
'
tpcpu bench --config "$1" --fake-weights --ranks 1
echo "code $?"
tpcpu generate --model "$2" --ranks 1 --prompt Once --cache-tokens 1000000
echo "code $?"
"""


@pytest.mark.parametrize("cpus", [1, 2])
def test_cores_and_memory_of_the_allocation_are_the_limits(slurm, cpus):
    """What does not fit is refused before anything is read, with figures."""
    script, log, config = (slurm.folder / f"limits{cpus}{end}" for end in ("", ".log", ".json"))
    script.write_text(LIMITS if cpus == 2 else LIMITS.partition("tpcpu bench")[0])
    config.write_text(json.dumps(PUBLISHED["llama-1b"]))
    flags = ["--ntasks=1", f"--cpus-per-task={cpus}", "--mem=500", f"--output={log}"]
    job = slurm.submit(*flags, script, config, YUAN, environ=environment())
    succeeded(slurm, job, log)
    seen, *refused = log.read_text().splitlines()
    assert seen == f"{cpus} 500 {cpus} Room(nbytes={400 << 20}, limit='SLURM (--mem) leaves')"
    if cpus == 2:
        assert [refused[1], refused[3]] == ["code 2", "code 2"]
        assert re.match(
            r"tpcpu: error: .* the weights of its ranks take 0\.\d\d GB .* SLURM \(--mem\) leaves .*B; more",
            refused[0],
        )
        assert re.search(r"a cache of 1000000 tokens .* GB, but SLURM .* or --cache-tokens of \d+ works", refused[2])


@pytest.mark.full
def test_the_time_limit_itself(slurm, speed):
    """The shortest limit is two minutes, as the signal may come a minute early: two minutes of work are begun."""
    faulthandler.cancel_dump_traceback_later()  # the one of tests that take no minutes
    flags = ["--time=2", "--signal=B:USR1@60", "--ntasks-per-node=2"]
    limited = Sent(slurm, "one-node.sbatch", "limited", 120 * speed, *flags)
    eventually(lambda: slurm.show(limited.job)["Restarts"] == "1", 180, limited.told)
    slurm.command("scontrol", "update", f"JobId={limited.job}", "TimeLimit=UNLIMITED")
    assert slurm.wait(limited.job, seconds=900)["JobState"] == "COMPLETED", limited.told()
    assert "goes back to the queue" in limited.told()
    assert "going on with" in limited.told()
    assert len(limited.texts()) == 2
