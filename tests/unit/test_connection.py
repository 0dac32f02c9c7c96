"""What no ranks can be joined with is refused before anything is started."""

import pytest

from tpcpu import LLM
from tpcpu.errors import UsageError
from tpcpu.parallel.communicator import Solo, connect


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"all_reduce": "hosts"}, "'window' and 'mpi' are"),
        ({"wire": "fp8"}, "'float32' and 'bf16' are"),
        ({"fault_timeout": 0}, "at least 1"),
        ({"fault_timeout": float("nan")}, "at least 1"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_impossible_connections_are_refused(tmp_path, ranks, wrong, part):
    with pytest.raises(UsageError, match=part):
        LLM(tmp_path, ranks=ranks, **wrong)


def test_a_lone_rank_needs_nothing():
    assert isinstance(connect(environ={}), Solo)
    with pytest.raises(UsageError, match="at least 1"):
        connect(environ={}, fault_timeout=0.5)
