"""Memory stays with its rank on four sockets: boots the virtual machine of machine.py and runs guest.py in it."""

import faulthandler
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.numa import guest, machine
from tpcpu.parallel import launcher

pytestmark = pytest.mark.full

PROJECT = Path(__file__).parents[2]
RANKS = 4


def guest_script(command: list[str], environ: dict[str, str], copies: dict[Path, str] | None = None) -> str:
    """A script for the guest that runs `command` in the project's folder with additional variables.

    `copies` are folders of this machine that the guest needs to write in, such as a cache of compiled kernels, and
    their places in the guest; times are kept, by which numba judges its cache.
    """
    lines = [f"cp -rp {shlex.quote(str(folder))} {shlex.quote(place)}" for folder, place in (copies or {}).items()]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
    lines += [f"export {name}={shlex.quote(value)}" for name, value in ({"PATH": path} | environ).items()]
    return "\n".join([f"cd {shlex.quote(str(PROJECT))}", *lines, f"exec {shlex.join(command)}", ""])


@pytest.fixture(scope="module")
def facts() -> dict[str, list[dict[str, Any]]]:
    """What the guest's ranks found, by check."""
    # emulation is slow, and ends by its own limit
    faulthandler.cancel_dump_traceback_later()
    command = launcher.command(RANKS, [sys.executable, "-m", "tests.numa.guest"])
    code, output = machine.run(guest_script(command, {"PYTHONDONTWRITEBYTECODE": "1"}), timeout=400)
    lines = [line for line in output.splitlines() if line.startswith(guest.MARK)]
    assert code == 0, output
    assert len(lines) == 1, output
    found: dict[str, list[dict[str, Any]]] = json.loads(lines[0].removeprefix(guest.MARK))
    return found


def test_four_sockets_are_seen(facts: dict[str, list[dict[str, Any]]]) -> None:
    for rank, seen in enumerate(facts["topology"]):
        assert (seen["sockets"], seen["nodes"], seen["default_ranks"]) == (4, 4, 4)
        assert seen["description"] == "4 sockets, 4 NUMA nodes, 4 cores"
        assert (seen["cpus"], seen["own_nodes"]) == ([rank], [rank])


def test_touched_pages_are_on_their_own_node(facts: dict[str, list[dict[str, Any]]]) -> None:
    for rank, seen in enumerate(facts["arena"]):
        # all of them: NUMA balancing hides pages that it watches
        assert seen["samples"] == 1000
        assert seen["local"] >= 0.99
        assert seen["local"] + seen["elsewhere"] == pytest.approx(1.0)
        assert seen["line"].startswith(f"rank {rank}: ")


def test_a_preferred_node_wins_over_first_touch(facts: dict[str, list[dict[str, Any]]]) -> None:
    for seen in facts["preferred"]:
        assert seen["accepted"]
        assert seen["local"] == 1.0
