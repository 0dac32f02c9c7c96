"""For tests under a real launcher: one communicator, and a failing rank that ends the job instead of hanging it.

Run as `mpiexec -n N python -m pytest --with-mpi tests/mpi`.
"""

import sys

import pytest

from tpcpu.parallel.communicator import Communicator, connect

_connected: list[Communicator] = []


@pytest.fixture(scope="session")
def communicator() -> Communicator:
    """All ranks of the job."""
    if not _connected:
        _connected.append(connect())
    return _connected[0]


@pytest.fixture(autouse=True)
def _started_together(communicator: Communicator) -> None:
    """Every test begins on all ranks at the same time."""
    communicator.barrier()


class _FailureEndsJob:
    """A rank whose test failed will not enter the collectives that the others wait in: say so, and end them all."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed or not _connected or _connected[0].size == 1:
            return
        capture = self._config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            sections = "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
            rank = _connected[0].rank
            print(f"\nrank {rank}: {report.nodeid} ({report.when}):\n{report.longreprtext}{sections}", file=sys.stderr)
            _connected[0].abort(1)


def pytest_configure(config: pytest.Config) -> None:
    """Watch the reports of this run."""
    config.pluginmanager.register(_FailureEndsJob(config))
