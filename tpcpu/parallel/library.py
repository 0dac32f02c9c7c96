"""Which MPI library this Python would use. Asks without starting MPI; knows nothing of ranks."""


def library_name() -> str | None:
    """Name and version, such as `MPICH 5.0.2`; None where mpi4py is missing or finds no library to load."""
    try:
        import mpi4py

        initialize, mpi4py.rc.initialize = mpi4py.rc.initialize, False
        try:
            from mpi4py import MPI
        finally:
            mpi4py.rc.initialize = initialize
    except (ImportError, RuntimeError):
        return None
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"
