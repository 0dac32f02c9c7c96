"""Who reads what of a checkpoint that ranks read together."""

from pathlib import Path

import numpy as np
import pytest

from tpcpu.engine.extents import LEAST_BYTES, Plan
from tpcpu.engine.parts import Part
from tpcpu.parallel.partition import Range


@pytest.mark.parametrize("placed", [True, False])
def test_weights_of_one_tensor_share_what_is_read_of_it(placed: bool) -> None:
    """Each section of a packed q, k and v is a part of its own: they were read three times."""
    rows, columns = 9000, 2048
    q, k, v = (Part("qkv", np.dtype(np.float16), rows, columns, {}) for _ in range(3))
    small = Part("small", np.dtype(np.float16), 10, columns, {})
    offsets = {"qkv": 1000, "small": 1000 + q.nbytes}
    plan = Plan([q, k, v, small], lambda name: (Path("file"), offsets[name]) if placed else None, 3)
    assert sum(extent.nbytes for extent in plan.extents) == q.nbytes + small.nbytes
    for part in (q, k, v):
        segments = plan.segments(part)
        assert [segment.part for segment in segments] == [part] * len(segments)
        at = 0
        for segment in segments:
            assert segment.rows == Range(at, at + len(segment.rows))
            assert segment in segment.extent.segments
            if placed:
                assert segment.extent.offset + segment.at == 1000 + at * part.row_bytes
            at = segment.rows.stop
        assert at == rows
    if placed:
        assert len(plan.extents) > 2
        assert min(extent.nbytes for extent in plan.extents) >= LEAST_BYTES
