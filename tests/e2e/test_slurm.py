"""The shipped batch files under a real SLURM on this machine, and srun: results, limits, requeueing.

The cluster is `tests/slurm.py`'s. Its nodes are smaller than the files' sockets, so tests give sbatch other counts
before the file's name, as a user would; the files are submitted as they are shipped.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import PROJECT, environment, eventually
from tests.slurm import Cluster, cluster, missing

DATA = PROJECT / "tests" / "data"
YUAN = DATA / "yuan-tiny"
FILES = PROJECT / "launch" / "slurm"
STORY = json.loads((YUAN / "reference.json").read_text())["cases"][0]
SECONDS = 240.0  # the first program on a machine compiles the kernels


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node: this machine, two CPUs."""
    assert not missing(), f"{missing()} are not installed; launch/test.sh installs them"
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder) as running:
        yield running
    assert running.processes() == []


def prompts(path: Path, count: int, tokens: int) -> Path:
    lines = [
        json.dumps({"id": f"r{n}", "prompt": STORY["prompt"], "max_tokens": tokens, "ignore_eos": True})
        for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def texts(*paths: Path) -> dict[str, str]:
    """Every answer by its id; no id twice."""
    answers = [line for path in paths for line in map(json.loads, path.read_text().splitlines())]
    found = {answer["id"]: json.dumps(answer.get("text", answer.get("response"))) for answer in answers}
    assert len(found) == len(answers)
    return found


def succeeded(slurm: Cluster, job: str, log: Path) -> None:
    shown = slurm.wait(job, seconds=SECONDS)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()


def test_a_job_that_is_warned_goes_back_to_the_queue_and_finishes(slurm):
    folder = slurm.folder
    given, answers, log = prompts(folder / "one.jsonl", 80, 200), folder / "one.out.jsonl", folder / "one.log"
    environ = environment(MODEL=str(YUAN), INPUT=str(given), OUTPUT=str(answers))
    job = slurm.submit("--ntasks-per-node=2", f"--output={log}", FILES / "one-node.sbatch", environ=environ)
    eventually(lambda: answers.exists() and answers.stat().st_size > 0, SECONDS, log.read_text)
    # What --signal=B:USR1@120 sends when time is up.
    slurm.command("scancel", "--signal=USR1", "--batch", job)
    succeeded(slurm, job, log)
    shown, said = slurm.show(job), log.read_text()
    assert shown["Restarts"] == "1", said
    assert "goes back to the queue" in said
    assert "going on with" in said
    found = texts(answers)
    assert set(found) == {f"r{n}" for n in range(80)}
    assert len(set(found.values())) == 1


def test_an_array_divides_the_lines_of_a_file(slurm):
    folder = slurm.folder
    given, answers = prompts(folder / "many.jsonl", 5, 8), folder / "many"
    arguments = ["--array=1-2", "--ntasks-per-node=1", f"--output={folder}/many-%a.log", FILES / "array.sbatch"]
    job = slurm.submit(*arguments, YUAN, given, answers, "--exact", environ=environment())
    for task in (1, 2):
        succeeded(slurm, f"{job}_{task}", folder / f"many-{task}.log")
    parts = [texts(answers / f"answers-{task}.jsonl") for task in (1, 2)]
    assert [set(part) for part in parts] == [{"r0", "r2", "r4"}, {"r1", "r3"}]


def test_srun_starts_the_driver(slurm):
    arguments = ["--ntasks=2", "--cpu-bind=none", "python", PROJECT / "launch" / "driver.py", YUAN]
    done = slurm.attempt("srun", "--mpi=pmi2", *arguments, environ=environment(), seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert "refused: prompt: holds no tokens" in done.stdout


def test_srun_without_mpi_is_told_the_mend(slurm):
    arguments = ["tpcpu", "generate", "--model", YUAN, "--prompt", "Once", "--max-tokens", "2"]
    done = slurm.attempt("srun", "--mpi=none", "--ntasks=2", *arguments, environ=environment(), seconds=SECONDS)
    assert done.returncode == 2
    assert "try srun --mpi=pmi2" in done.stderr
    assert "Traceback" not in done.stderr


LIMITS = """
from tpcpu.parallel.topology import Topology
topology = Topology.detect()
print(topology.limits.slurm_cpus, topology.limits.memory >> 20, len(topology.cores_for(0, 1)))
"""


def test_cores_and_memory_of_the_allocation_are_the_limits(slurm):
    script, log = slurm.folder / "limits.py", slurm.folder / "limits.log"
    script.write_text(f"#!{sys.executable}{LIMITS}")
    job = slurm.submit("--ntasks=1", "--mem=700", f"--output={log}", script, environ=environment())
    succeeded(slurm, job, log)
    assert log.read_text().split() == ["1", "700", "1"]


def test_several_nodes(tmp_path):
    with cluster(tmp_path, nodes=2) as slurm:
        given = prompts(tmp_path / "in.jsonl", 3, 8)
        found = {}
        for launch in ("srun", "mpiexec"):
            answers, log = tmp_path / f"{launch}.jsonl", tmp_path / f"{launch}.log"
            environ = environment(MODEL=str(YUAN), INPUT=str(given), OUTPUT=str(answers), LAUNCH=launch)
            arguments = ["--ntasks-per-node=1", f"--output={log}", FILES / "nodes.sbatch"]
            job = slurm.submit(*arguments, environ=environ)
            succeeded(slurm, job, log)
            assert slurm.show(job)["NumNodes"] == "2"
            found[launch] = texts(answers)
    assert slurm.processes() == []
    assert found["srun"] == found["mpiexec"]
    assert set(found["srun"]) == {"r0", "r1", "r2"}


@pytest.mark.full
def test_the_time_limit_itself(slurm):
    """The shortest limit is a minute, and the signal may come a minute early: it begins with a minute of work."""
    folder = slurm.folder
    given, answers, log = prompts(folder / "long.jsonl", 400, 300), folder / "long.out.jsonl", folder / "long.log"
    arguments = ["--time=2", "--signal=B:USR1@60", "--ntasks-per-node=2", f"--output={log}", FILES / "one-node.sbatch"]
    job = slurm.submit(*arguments, YUAN, given, answers, "--exact", environ=environment())
    shown = slurm.wait(job, seconds=900)
    assert shown["JobState"] == "COMPLETED", log.read_text()
    assert int(shown["Restarts"]) >= 1, log.read_text()
    assert set(texts(answers)) == {f"r{n}" for n in range(400)}
