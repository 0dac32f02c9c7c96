"""The one line of `tpcpu --version`. Asks the machine; computes nothing and loads no model."""

from tpcpu import __version__


def version_line() -> str:
    """Version, MPI library, instruction set, sockets, NUMA nodes and cores, comma-separated."""
    from tpcpu.kernels import isa
    from tpcpu.parallel.library import library_name
    from tpcpu.parallel.topology import Topology

    library = library_name() or "no MPI library (one rank works; pip install 'tpcpu[mpich]' brings one)"
    return f"tpcpu {__version__}, {library}, {isa.selected()}, {Topology.detect().describe()}"
