"""Teams for all tests of kernels: threads are made once, and more of them than many machines have cores."""

from collections.abc import Iterator

import pytest

from tpcpu.parallel.team import Team


@pytest.fixture(scope="session")
def teams() -> Iterator[list[Team]]:
    """Teams of 1, 2 and 3 threads, not pinned: they have to give the same bits."""
    made = [Team(range(threads), pinned=False, crowded=threads > 1) for threads in (1, 2, 3)]
    yield made
    for team in made:
        team.close()
