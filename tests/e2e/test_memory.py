"""Peak memory of quantising and of loading: never more than what stays, one tensor, and what an empty model takes.

Each in a process of its own, watched from outside. Two figures: anonymous and shared memory, sampled, which is what a
machine has to have; and the kernel's own peak of everything resident, mapped pages of the checkpoint included.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bench.quantize_speed import make_model
from tests.shared import DATA

QUANTIZE = """
import sys
from tpcpu.quantize import quantize
print(quantize(sys.argv[1], sys.argv[2], "nf4").written_bytes)
"""
LOAD = """
import sys
from tpcpu.engine.engine import Engine, Options
from tpcpu.parallel.communicator import Solo
options = Options(format=sys.argv[2] or None, read=sys.argv[3])
print(Engine(sys.argv[1], Solo(), options).weight_bytes)
"""


class Peak(NamedTuple):
    """Bytes at most: anonymous and shared, resident at all, and what was printed as staying."""

    own: int
    resident: int
    final: int


def measure(code: str, *arguments: str | Path) -> Peak:
    """Runs Python code in a child and looks at its memory every other millisecond."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, env=environment
    )
    own = resident = 0
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except ProcessLookupError:
            break
        fields = {key: int(value.split()[0]) << 10 for key, _, value in (line.partition(":") for line in lines)
                  if value.endswith("kB")}  # fmt: skip
        own = max(own, fields.get("RssAnon", 0) + fields.get("RssShmem", 0))
        resident = max(resident, fields.get("VmHWM", 0))
        time.sleep(0.002)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return Peak(own, resident, int(output))


@pytest.mark.parametrize("gigabytes", [0.4, pytest.param(2, marks=pytest.mark.full)])
def test_what_stays_and_one_tensor(tmp_path, gigabytes):
    large, tiny = tmp_path / "large", DATA / "llama-tiny"
    largest = make_model(large, gigabytes)
    measure(QUANTIZE, tiny, tmp_path / "first")  # compiles what this machine has not compiled yet
    measure(LOAD, tiny, "nf4", "local")
    peaks = {}
    for what, code, empty, full in (
        ("quantise", QUANTIZE, (tiny, tmp_path / "tiny-nf4"), (large, tmp_path / "large-nf4")),
        ("load bf16 as nf4", LOAD, (tiny, "nf4", "local"), (large, "nf4", "local")),
        ("load nf4", LOAD, (tmp_path / "tiny-nf4", "", "local"), (tmp_path / "large-nf4", "", "local")),
        ("load bf16 as nf4, shared", LOAD, (tiny, "nf4", "shared"), (large, "nf4", "shared")),
    ):
        base, peak = measure(code, *empty), measure(code, *full)
        peaks[what] = (peak.own - base.own, peak.resident - base.resident, peak.final)
    for what, (own, resident, final) in peaks.items():
        print(f"{what}: {own / 1e6:.0f} MB of its own, {resident / 1e6:.0f} MB resident; {final / 1e6:.0f} MB stay, "
              f"the largest tensor has {largest / 1e6:.0f} MB")  # fmt: skip
    for what, (own, resident, final) in peaks.items():
        assert max(own, resident) <= final + 1.2 * largest, what
    assert peaks["quantise"][0] <= 1.2 * largest  # nothing stays
    assert len({final for what, (_, _, final) in peaks.items() if what.startswith("load")}) == 1
