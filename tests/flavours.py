"""Which MPI the tests run with: the one in the environment of the Python that runs them.

Knows what tests have to tell its launcher beside the number of ranks; nothing of what the ranks do.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from tpcpu.parallel.announcement import INTEL, MPICH, OPEN_MPI, announced
from tpcpu.parallel.launcher import find_mpiexec

Flavour = Literal["mpich", "openmpi", "impi"]

LAUNCHER_VARIABLES = (
    "PMI_", "PMIX_", "PRTE_", "OMPI_", "SLURM_", "HYDRA", "HYDI_", "MPI_LOCAL", "MPIR_CVAR", "I_MPI_HYDRA",
)  # fmt: skip
"""Beginnings of the variables in which launchers speak to ranks."""

ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""Open MPI's leave to run as root; the other MPIs do not read it."""
CROWDED = {"PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe"}
"""Open MPI's leave to start more ranks than there are cores, which it then does not bind."""


@cache
def flavour() -> Flavour:
    """Of the mpiexec beside this Python."""
    kinds: dict[str | None, Flavour] = {MPICH: "mpich", OPEN_MPI: "openmpi", INTEL: "impi"}
    return kinds[find_mpiexec().kind]


def variables_of(process: int) -> dict[str, str]:
    """The environment that a process was started with; empty where it has ended or is another user's."""
    try:
        lines = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return {name: value for name, _, value in (os.fsdecode(line).partition("=") for line in lines) if name}


def rank_in(environ: Mapping[str, str]) -> int | None:
    """The rank of a process, as its launcher told it."""
    told = announced(environ)
    return None if told is None else told.rank
