"""Several hosts, as far as one machine shows them: ranks are told that they share no memory with some of the others.

Windows inside the pretended hosts and messages between them are real. `tests/e2e/test_matrix.py` has separate networks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpcpu import SamplingParams
from tpcpu.engine.engine import Options
from tpcpu.engine.local import Local
from tpcpu.formats import floats
from tpcpu.parallel.communicator import Communicator, Wire, connect
from tpcpu.parallel.exchanges import Exchanges
from tpcpu.parallel.team import Team

pytestmark = pytest.mark.mpi

DATA = Path(__file__).parents[1] / "data"
MAPS = {"one rank each": (0, 1, 2, 3), "uneven": (0, 1, 1, 1), "interleaved": (0, 1, 0, 1)}
"""The host of each rank."""


@pytest.fixture(scope="module", params=MAPS.values(), ids=MAPS.keys())
def parted(request: pytest.FixtureRequest, communicator: Communicator) -> Iterator[Communicator]:
    """The ranks of this job on so many hosts."""
    if communicator.size == 1:
        yield communicator
        return
    # Not above: it keeps mpi4py from starting MPI, which pytest-mpi asks at the end, where a lone rank starts none.
    from tpcpu.parallel import mpi

    host_of = request.param[: communicator.size]

    def split(comm: Any) -> Any:
        return comm.Split(host_of[comm.rank], comm.rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpi, "_split_by_host", split)
        yield connect()


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team([0, 0], pinned=False, crowded=True)
    yield made
    made.close()


def in_host_order(communicator: Communicator, parts: np.ndarray[Any, Any], wire: Wire) -> np.ndarray[Any, Any]:
    total = None
    for host in range(len(communicator.hosts)):
        of_host = [part for part, at in zip(parts, communicator.host_of, strict=True) if at == host]
        one = of_host[0].copy()
        for part in of_host[1:]:
            one += part
        if wire == "bf16":
            one = floats.to_float32(floats.convert(one, "bfloat16"))
        total = one if total is None else total + one
    assert total is not None
    return total


@pytest.mark.parametrize("wire", ["float32", "bf16"])
@pytest.mark.parametrize("width", [80, 8192, 300_000])
def test_sums_are_added_in_host_order(parted: Communicator, team: Team, width: int, wire: Wire) -> None:
    if parted.size == 1:
        return
    assert parted.all_reduce_kind == "hosts"
    call = parted.all_reduce(team, wire)
    assert call.slices == min(parted.host_of.count(host) for host in set(parted.host_of))
    exchange = Exchanges(call, team, width, 4)
    random = np.random.default_rng(parted.rank)
    for _ in range(3):
        exchange.x[:] = random.standard_normal(width) * 10.0 ** random.integers(-3, 4, width)
        exchange.out[:] = 0
        total = in_host_order(parted, parted.all_gather(exchange.x), wire)
        exchange.run()
        np.testing.assert_array_equal(exchange.out.view(np.uint32), total.view(np.uint32))


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_messages_reach_every_host(parted: Communicator, size: int) -> None:
    if parted.size == 1:
        return
    for number in range(10):
        if parted.is_root:
            parted.send_message(np.full(size, number, np.int32))
        else:
            message = np.zeros(size, np.int32)
            parted.wait_message(message)
            assert (message == number).all()
        parts = parted.gather(np.full(parted.rank + 1, number), range(1, parted.size + 1))
        if parts is not None:
            assert [part.tolist() for part in parts] == [[number] * (rank + 1) for rank in range(parted.size)]


@pytest.mark.parametrize("name", ["yuan-tiny", "llama-tiny"])
def test_answers_are_those_of_one_host(communicator: Communicator, parted: Communicator, name: str) -> None:
    """In exact arithmetic: sums of hosts are added in another order, but hardly differ."""
    prompts = ["Once upon a time", "The big dog " * 20]
    params = [SamplingParams(max_tokens=24, ignore_eos=True)] * 2
    answers = []
    for each in (communicator, parted):
        model = Local(DATA / name, Options(format="nf4", exact=True, threads=2), each, None)
        answers.append([answer.ids for answer in model.generate(prompts, params)])
        model.close()
    assert answers[0] == answers[1]


def test_bf16_between_hosts_loses_little(parted: Communicator) -> None:
    text = (DATA / "heldout.txt").read_text()[:3000]
    losses = []
    for wire in ("float32", "bf16"):
        model = Local(DATA / "yuan-tiny", Options(format="nf4", threads=1, wire=wire), parted, None)
        (score,) = model.score([text], 256)
        losses.append(score.nll / score.tokens)
        model.close()
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    assert (losses[0] == losses[1]) == (parted.size == 1)
