"""What launchers say through the environment, and what `connect` makes of it in a child process that has no MPI job."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from tpcpu.parallel.announcement import INTEL, MPICH, OPEN_MPI, PMIX, SRUN, Announcement, announced
from tpcpu.parallel.launcher import in_launcher

STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_ID": "0"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, Announcement(MPICH, 1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "I_MPI_HYDRA_UUID": "x"}, Announcement(INTEL, 1, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2", "PMIX_RANK": "2"}, Announcement(OPEN_MPI, 2, 3)),
        ({"PMIX_RANK": "1"}, Announcement(PMIX, 1, None)),
        (STEP, Announcement(SRUN, 2, 4)),
        (STEP | {"PMI_SIZE": "4", "PMI_RANK": "2"}, Announcement(SRUN, 2, 4)),
        (STEP | {"PMIX_RANK": "2"}, Announcement(SRUN, 2, 4)),
        # mpiexec inside an allocation starts its proxies by srun: the inner launcher counts
        (STEP | {"PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALNRANKS": "4"}, Announcement(MPICH, 5, 8)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Announcement(SRUN, 0, 1)),
        # a batch script, and an interactive shell that SLURM runs as a step of its own kind
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, None),
        (STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, None),
        ({"PMI_SIZE": "nonsense"}, None),
    ],
)
def test_announced(environ: dict[str, str], expected: Announcement | None) -> None:
    assert announced(environ) == expected
    assert in_launcher(environ) == (expected is not None)


CONNECT = """
import sys
from tpcpu.errors import LaunchError
from tpcpu.parallel.communicator import connect
try:
    communicator = connect()
except LaunchError as error:
    print(error)
    sys.exit(2)
print(type(communicator).__name__, communicator.size, "mpi4py" in sys.modules)
"""


def connect_with(environ: dict[str, str]) -> tuple[int, str]:
    """Exit code and standard output of a child that connects under these variables and no launcher's."""
    launchers = ("OMPI_", "PMI", "PRTE", "SLURM_", "I_MPI_", "MPI_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    arguments = [sys.executable, "-W", "error", "-c", CONNECT]
    done = subprocess.run(arguments, env=clean | environ, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("environ", [{}, BATCH, {"PMI_SIZE": "1", "PMI_RANK": "0"}])
def test_alone_needs_no_mpi(environ: dict[str, str]) -> None:
    assert connect_with(environ) == (0, "Solo 1 False")


def library_is_mpich() -> bool:
    """Is the MPI library the one of the mpich wheel, as in `tpcpu[mpich]`?"""
    try:
        return version("mpich") >= "5"
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not library_is_mpich(), reason="the MPI library is not the wheel of MPICH")
class TestMismatch:
    """Several processes are announced, and each is alone: the line names launcher, library and mend."""

    def test_srun_without_a_plugin_for_mpi(self) -> None:
        code, line = connect_with(STEP | {"SLURM_PROCID": "0"})
        assert code == 2
        assert line.startswith("srun started 4 processes, but each is alone in MPICH 5")
        assert "srun --mpi=pmi2" in line
        assert "\n" not in line

    def test_open_mpis_launcher_is_refused_before_mpich_aborts(self) -> None:
        code, line = connect_with({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"})
        assert code == 2
        assert line.startswith("Open MPI's mpirun started 2 processes, but each is alone in MPICH 5")
        assert "tpcpu[openmpi]" in line

    def test_size_unknown_and_truly_alone(self) -> None:
        assert connect_with({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}) == (0, "Solo 1 False")


def test_no_library_at_all() -> None:
    code, line = connect_with({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert code == 2
    assert line.startswith("MPICH's mpiexec started 2 processes, but mpi4py finds no MPI library")
    assert "pip install 'tpcpu[mpich]'" in line
