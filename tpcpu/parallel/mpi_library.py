"""The MPI library that mpi4py finds: its name, its functions by address, and whether it fits the launcher.

Sets mpi4py up, which others take from here as `MPI`. Importing this loads the library and starts nothing.
"""

import ctypes
import sys
from pathlib import Path
from typing import Literal

import mpi4py

# MPI is started by `mpi.Mpi`, at the level it needs, and not by the import
mpi4py.rc.initialize = False
mpi4py.rc.finalize = True

from mpi4py import MPI  # noqa: E402

from tpcpu.errors import LaunchError  # noqa: E402
from tpcpu.parallel.announcement import INTEL, MPICH, OPEN_MPI, SRUN, Announcement  # noqa: E402
from tpcpu.parallel.communicator import Wire  # noqa: E402

__all__ = ["MPI", "MpiFunction", "library_name", "mpi_call", "refuse_other_launcher", "strangers"]

MpiFunction = Literal["MPI_Allgather", "MPI_Allreduce"]

_EXTRAS = {OPEN_MPI: "openmpi", MPICH: "mpich", INTEL: "impi"}


def mpi_call(comm: MPI.Comm, name: MpiFunction, wire: Wire = "float32") -> tuple[int, tuple[int, ...]]:
    """The address of an MPI function in the library that mpi4py uses, and the handles to call it with.

    Handles are 64-bit integers, whether the library's are `int` (MPICH, Intel MPI) or pointers (Open MPI): passed as
    int64 both arrive. In order: the datatype, for MPI_Allreduce the sum operation, the communicator. A rank that has no
    part in `comm` has a handle that it must not use.
    """
    # the extension module is loaded already, and a look-up through it also searches the library it was linked with
    library = ctypes.CDLL(MPI.__file__)
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    datatype = MPI.FLOAT if wire == "float32" else MPI.UINT16_T
    objects = (datatype, comm) if name == "MPI_Allgather" else (datatype, MPI.SUM, comm)
    # an int handle with its top bit set comes sign-extended and unsigned
    handles = (MPI._handleof(each) for each in objects)
    return address, tuple(handle - (1 << 64) if handle >> 63 else handle for handle in handles)


def library_name() -> str:
    """The MPI library in a few words, such as `MPICH 5.0.2`; starts nothing."""
    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def refuse_other_launcher(announcement: Announcement) -> None:
    """Refuse, before MPI starts, a library that cannot speak to this launcher: MPI itself would abort or be alone."""
    open_mpi = MPI.get_vendor()[0] == "Open MPI"
    hydra = announcement.launcher in (MPICH, INTEL)
    known = MPI.get_vendor()[0] in ("MPICH", "Intel MPI", "MVAPICH")
    if (hydra and open_mpi) or (announcement.launcher == OPEN_MPI and known):
        raise LaunchError(strangers(announcement))


def strangers(announcement: Announcement) -> str:
    """The one line for a launcher and a library that do not find each other."""
    found = f"{announcement.launcher} started {announcement.size} processes, but each is alone in {library_name()}"
    if announcement.launcher == SRUN:
        return f"{found}; try srun --mpi=pmi2 (MPICH, Intel MPI) or --mpi=pmix (Open MPI), or mpiexec in the allocation"
    beside = Path(sys.executable).with_name("mpiexec")
    own = str(beside) if beside.exists() else "the mpiexec of that library"
    extra = _EXTRAS.get(announcement.launcher)
    return f"{found}; start with {own}" + (f", or pip install 'tpcpu[{extra}]' for this launcher" if extra else "")
