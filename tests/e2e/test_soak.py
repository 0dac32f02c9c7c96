"""A little of `soak.py`: memory that grows with work shows in much less than its half hour."""

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import family

SCRIPT = Path(__file__).with_name("soak.py")


@pytest.mark.parametrize("minutes", [0.6, pytest.param(1.9, marks=pytest.mark.full)])
def test_memory_is_flat(tmp_path, minutes):
    """Whatever is filled once is filled on purpose at the beginning, so warm-up is short."""
    with family([sys.executable, SCRIPT, "--minutes", str(minutes), "--warm-up", "15"], tmp_path) as started:
        code, out, err = started.end()
        assert code == 0, out + err
        started.assert_nothing_left()
    result = json.loads(out.splitlines()[-1])
    assert result["flat"]
    assert result["change"] <= 0.01
    assert result["answers"] > 0
    assert result["cancelled"] > 0
    assert result["runs"] > result["batches"] > 0
    assert result["journal_share"] + result["supervision_share"] < 0.01
