"""Where the threads of ranks run, whatever their launcher did to them: with its own flags, and without any."""

import re
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import PROJECT, eventually, family
from tests.flavours import CROWDED, flavour
from tests.hosts import hosts, missing
from tpcpu.parallel.topology import Topology

YUAN = PROJECT / "tests" / "data" / "yuan-tiny"
PROGRAM = f"""
from tpcpu import LLM, SamplingParams
with LLM({str(YUAN)!r}, exact=True) as llm:
    print("begun", flush=True) if llm.is_root else None
    while True:
        for chunk in llm.stream("Once", SamplingParams(max_tokens=400, ignore_eos=True)):
            pass
"""
# `-bind-to none` and its like are what hostfiles/README.md asks for; the others are what people use besides
FLAGS = {
    "mpich": ["", "-bind-to none", "-bind-to core"],
    "openmpi": ["", "--bind-to none", "--bind-to core --map-by core"],
    "impi": ["", "-genv I_MPI_PIN 0", "-genv I_MPI_PIN_DOMAIN core"],
}[flavour()]
HOSTFILE = {"mpich": "mpich", "openmpi": "openmpi", "impi": "intel"}[flavour()]


def masks(number: int) -> set[str]:
    """The CPUs that each thread of a process may run on."""
    found = set()
    for thread in Path(f"/proc/{number}/task").iterdir():
        lines = (thread / "status").read_text().splitlines()
        found.add(next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")))
    return found


def check(command: list[str | Path], folder: Path, shares: list[tuple[int, int]]) -> None:
    """`shares`: each rank's place among the ranks of its host, and how many these are.

    The caller of a step is placed while it runs, so a rank is looked at until all its threads are seen at work.
    """
    (folder / "program.py").write_text(PROGRAM)
    unset = [word for name in CROWDED for word in ("-u", name)]  # with it Open MPI would bind nothing
    with family(["env", *unset, *command], folder) as started:
        started.say_until("begun")
        topology, ranks = Topology.detect(), started.ranks()
        assert len(ranks) == len(shares)
        for rank, (place, size) in zip(ranks, shares, strict=True):
            own = {str(cpu) for cpu in topology.cores_for(place, size)}
            others = {str(cpu) for other in range(size) for cpu in topology.cores_for(other, size)} - own
            eventually(lambda r=rank, o=own: o <= masks(r), 20, lambda r=rank, o=own: f"{masks(r)}, expected {o}")
            assert others.isdisjoint(masks(rank))


@pytest.mark.flavours
@pytest.mark.skipif(len(Topology.detect().cores) < 2, reason="needs two cores")
@pytest.mark.parametrize("flags", [FLAGS[0], *(pytest.param(flags, marks=pytest.mark.full) for flags in FLAGS[1:])])
def test_two_ranks_have_cores_of_their_own(tmp_path, flags):
    check(["mpiexec", *flags.split(), "-n", "2", sys.executable, "program.py"], tmp_path, [(0, 2), (1, 2)])


@pytest.mark.flavours
@pytest.mark.skipif(len(Topology.detect().cores) < 2, reason="needs two cores")
def test_a_lone_rank_has_all_cores(tmp_path):
    """Open MPI leaves it one."""
    check(["mpiexec", "-n", "1", sys.executable, "program.py"], tmp_path, [(0, 1)])


@pytest.mark.flavours
@pytest.mark.full
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_ranks_of_two_hosts(tmp_path):
    """Launched without a flag; Open MPI leaves the lone rank of the second host one core."""
    with hosts(2, tmp_path) as made:
        command = made.command([2, 1], [sys.executable, "program.py"], flavour(), flags=[])
        check(command, tmp_path, [(0, 2), (1, 2), (0, 1)])


@pytest.mark.flavours
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_hostfile_and_its_command(tmp_path):
    """The example for this MPI, started as its first lines say: two ranks on the first host and one on the second."""
    text = (PROJECT / "hostfiles" / HOSTFILE).read_text()
    (told,) = re.findall(r"^# (mpi(?:exec|run) .*) tpcpu generate --model DIR --prompt TEXT$", text, re.MULTILINE)
    assert f"hostfiles/{HOSTFILE} " in told
    with hosts(2, tmp_path) as made:
        for number, (name, ranks) in enumerate(zip(made.names, "21", strict=True), 1):
            text, changed = re.subn(rf"^node{number}(\D+)4\b", rf"{name}\g<1>{ranks}", text, flags=re.MULTILINE)
            assert changed == 1
        (tmp_path / "hostfiles").mkdir()
        (tmp_path / "hostfiles" / HOSTFILE).write_text(text)
        words = told.replace("-n 8", "-n 3").split()
        check(made.inside([*words, sys.executable, "program.py"]), tmp_path, [(0, 2), (1, 2), (0, 1)])
