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


def test_what_lies_between_one_another_is_read_by_one_rank() -> None:
    """Rows of gates and of ups alternate in one tensor: two ranks, on two hosts perhaps, read all of it."""
    names = [f"{expert}.{part}" for expert in range(6) for part in ("gate", "up")]
    parts = [Part(name, np.dtype(np.uint8), 8, 64, {}) for name in names]
    plan = Plan(parts, lambda _: None, 3, lambda name: name.partition(".")[0])
    readers = [plan.segments(part)[0].reader for part in parts]
    assert readers[::2] == readers[1::2]
    assert set(readers) == {0, 1, 2}
