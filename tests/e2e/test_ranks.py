"""What ranks do to a machine: where their threads run, what they use while idle, and more of them than cores."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.processes import SECONDS, environment, family
from tpcpu import LLM, SamplingParams
from tpcpu.parallel.topology import Topology

DATA = Path(__file__).parents[1] / "data"
YUAN = DATA / "yuan-tiny"
STORY = next(case for case in json.loads((YUAN / "reference.json").read_text())["cases"] if case["name"] == "story")
GENERATE = [sys.executable, "-m", "tpcpu", "generate", "--model", YUAN, "--prompt", STORY["prompt"], "--ignore-eos"]
TICKS = os.sysconf("SC_CLK_TCK")


def descendants() -> list[int]:
    """All processes below this one."""
    found, new = [], [os.getpid()]
    while new:
        number = new.pop()
        found.append(number)
        for thread in Path(f"/proc/{number}/task").iterdir():
            new += map(int, (thread / "children").read_text().split())
    return found


def used_seconds() -> float:
    """Processor time of this process and all below it."""
    total = 0
    for number in descendants():
        # the name, in brackets, may hold blanks
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def test_idle_ranks_use_no_processor():
    """Under 2 % of a core is asked; what a loaded machine's clock ticks may add is left open."""
    with LLM(YUAN, ranks=2, format="nf4") as llm:
        llm.generate("Once", SamplingParams(max_tokens=4))
        time.sleep(0.3)  # ranks look closely for a moment
        before, start = used_seconds(), time.monotonic()
        time.sleep(3)
        assert (used_seconds() - before) / (time.monotonic() - start) < 0.03


def masks(number: int) -> list[str]:
    """The CPUs that each thread of a process may run on."""
    found = []
    for thread in Path(f"/proc/{number}/task").iterdir():
        lines = (thread / "status").read_text().splitlines()
        found.append(next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")))
    return found


@pytest.mark.skipif(len(Topology.detect().cores) < 2, reason="needs two cores")
def test_threads_of_two_ranks_are_pinned_to_cores_of_their_own(tmp_path):
    """The caller of a step is placed while it runs, so rank 0 is looked at until it is seen at work."""
    text = [
        "from tpcpu import LLM, SamplingParams",
        f"with LLM({str(YUAN)!r}, exact=True) as llm:",
        "    while True:",
        "        for chunk in llm.stream('Once', SamplingParams(max_tokens=400, ignore_eos=True)):",
        "            print('begun', flush=True) if llm.is_root else None",
    ]
    (tmp_path / "program.py").write_text("\n".join(text))
    arguments = ["mpiexec", "-n", "2", sys.executable, "program.py"]
    with family(arguments, tmp_path, stderr=subprocess.DEVNULL) as started:
        started.say_until("begun")
        topology, (first, second) = Topology.detect(), started.ranks()
        wanted = [{str(cpu) for cpu in topology.cores_for(rank, 2)} for rank in (0, 1)]
        assert wanted[0].isdisjoint(wanted[1])
        deadline = time.monotonic() + 20
        while not (wanted[0] <= set(masks(first)) and wanted[1] <= set(masks(second))):
            assert time.monotonic() < deadline, (masks(first), masks(second), wanted)
        assert wanted[0].isdisjoint(masks(second))
        assert wanted[1].isdisjoint(masks(first))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2 * (os.cpu_count() or 1), ()), (2, ("--all-reduce", "mpi"))],
    ids=["crowded", "MPI_Allreduce"],
)
def test_answers_of_other_launches(ranks, flags):
    """Twice as many ranks as processors, up to eight; and MPI's own sum, which has its own order, on two."""
    command = ["mpiexec", "-n", str(min(ranks, 8)), *GENERATE, "--exact", "--max-tokens", "48", "--json", *flags]
    done = subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ids"] == STORY["greedy_ids"]
    # Ranks that wait for one another without giving way take a hundred times as long.
    assert answer["decode_tokens_per_s"] > 5
