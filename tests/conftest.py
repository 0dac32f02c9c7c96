"""For all tests: the long ones are left out unless asked for, and no MPI segment stays behind."""

import signal
from collections.abc import Iterator
from typing import NoReturn

import pytest

from tpcpu.parallel.announcement import announced
from tpcpu.parallel.segments import launchers_files, named_segments, unlink_orphans


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full` adds the tests marked full."""
    parser.addoption("--full", action="store_true", help="run the tests marked full too")


def pytest_configure() -> None:
    """A run that is ended at a limit takes away what its tests have set up: hosts, daemons, ranks."""

    def end(number: int, frame: object) -> NoReturn:  # noqa: ARG001
        pytest.exit("ended by SIGTERM", 143)

    signal.signal(signal.SIGTERM, end)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, rather than skip, what is marked full: a skip would say that something is missing here."""
    if config.getoption("--full") or "full" in config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session", autouse=True)
def _segments_removed() -> Iterator[None]:
    """Tests kill ranks on purpose; what their MPI could not unlink any more is unlinked here."""
    older = named_segments() | launchers_files()
    yield
    # ranks of a test run must not judge what their companions still need
    if announced() is None:
        unlink_orphans(older)
