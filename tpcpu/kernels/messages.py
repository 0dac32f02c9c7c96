"""Joining the ranks from inside the step by MPI: its functions called by address, with their handles, by thread 0.

Knows how a C function is called; must not know MPI beyond that.
"""

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import kernel
from tpcpu.kernels.exchange import note_wait
from tpcpu.kernels.memory import call_c, cycles, load_i64, store_i64


@kernel("all-gather")
def all_gather(record, thread, _threads):
    """Sends this rank's partial sums to all ranks and receives theirs, in rank order."""
    if thread == 0:
        count = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TOKENS) * load_i64(record + 8 * R.ROW_FLOATS)
        datatype = load_i64(record + 8 * R.DATATYPE)
        team, began = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TEAM), cycles()
        status = call_c(
            load_i64(record + 8 * R.FUNCTION), load_i64(record + 8 * R.SEND), count, datatype,
            load_i64(record + 8 * R.RECEIVE), count, datatype, load_i64(record + 8 * R.COMMUNICATOR),
        )  # fmt: skip
        note_wait(team, thread, began)
        store_i64(record + 8 * R.STATUS, status)


@kernel("mpi-all-reduce")
def mpi_all_reduce(record, thread, _threads):
    """The sum over all ranks, added in whatever order the MPI library likes."""
    if thread == 0:
        count = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TOKENS) * load_i64(record + 8 * R.ROW_FLOATS)
        team, began = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TEAM), cycles()
        status = call_c(
            load_i64(record + 8 * R.FUNCTION), load_i64(record + 8 * R.SEND), load_i64(record + 8 * R.RECEIVE), count,
            load_i64(record + 8 * R.DATATYPE), load_i64(record + 8 * R.OPERATION),
            load_i64(record + 8 * R.COMMUNICATOR), 0,
        )  # fmt: skip
        note_wait(team, thread, began)
        store_i64(record + 8 * R.STATUS, status)
