"""What a launcher told this process through the environment: that it is one of several.

Knows the variables of MPI launchers and of SLURM; must not import or start MPI.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

OPEN_MPI = "Open MPI's mpirun"
MPICH = "MPICH's mpiexec"
INTEL = "Intel MPI's mpiexec"
SRUN = "srun"
PMIX = "a PMIx launcher"

# step numbers from here on are no steps of tasks: SLURM's interactive, batch and external ones
_SPECIAL_STEPS = 0xFFFFFFFA


@dataclass(frozen=True)
class Announcement:
    """This process is `rank` of `size` (None: the launcher does not say how many) under `launcher`."""

    launcher: str
    rank: int
    size: int | None


def announced(environ: Mapping[str, str] = os.environ) -> Announcement | None:
    """What the environment says about this process' companions; None where no launcher speaks.

    The innermost launcher counts: `mpiexec` in a SLURM allocation before SLURM. A batch script that runs plain `python`
    has SLURM_NTASKS and SLURM_PROCID, but is no step of tasks and therefore no launcher's child.
    """
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if size is not None:
        return Announcement(OPEN_MPI, _number(environ, "OMPI_COMM_WORLD_RANK") or 0, size)
    step = _slurm_step(environ)
    size = _number(environ, "PMI_SIZE")
    if size is not None:
        hydra = "MPI_LOCALNRANKS" in environ or step is None
        intel = any(name.startswith("I_MPI_HYDRA") for name in environ)
        launcher = (INTEL if intel else MPICH) if hydra else SRUN
        return Announcement(launcher, _number(environ, "PMI_RANK") or 0, size)
    if step is not None:
        return step
    rank = _number(environ, "PMIX_RANK")
    return None if rank is None else Announcement(PMIX, rank, None)


def _slurm_step(environ: Mapping[str, str]) -> Announcement | None:
    """The tasks that srun started, if this is one of them."""
    step, rank = _number(environ, "SLURM_STEP_ID"), _number(environ, "SLURM_PROCID")
    if step is None or rank is None or step >= _SPECIAL_STEPS:
        return None
    size = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS")
    return None if size is None else Announcement(SRUN, rank, size)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None
