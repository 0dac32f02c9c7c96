"""The one line of `tpcpu --version`. Asks the machine; computes nothing and loads no model."""

from tpcpu import __version__


def version_line() -> str:
    """Version, MPI library, instruction set, sockets, NUMA nodes and cores, comma-separated."""
    from tpcpu.kernels import isa
    from tpcpu.parallel.topology import Topology

    return f"tpcpu {__version__}, {_library()}, {isa.selected().name}, {Topology.detect().describe()}"


def _library() -> str:
    try:
        from tpcpu.parallel.mpi_library import library_name

        return library_name()
    except (ImportError, RuntimeError):  # mpi4py is missing, or finds no library to load
        return "no MPI library (one rank works; pip install 'tpcpu[mpich]' brings one)"
