"""Standard error of what was started: passed on as it comes, its lines of error kept, and withheld where asked."""

import os
import time

import pytest

from tpcpu.parallel.outcry import Outcry

PIECES = [
    b"read",
    b"ing 1 %\r",
    b"reading 2 %\n",
    b"tpc",
    b"pu: err",
    b"or: rank 1 died\ntpcpu: note: x\n",
    b"see: tpcpu: error: y\nt",
]
WHOLE = b"".join(PIECES)


@pytest.mark.parametrize("withhold", [False, True])
def test_errors_are_kept(capfd, withhold):
    reading, writing = os.pipe()
    outcry = Outcry(os.fdopen(reading, "rb"), withhold=withhold)
    for piece in PIECES:
        os.write(writing, piece)
        time.sleep(0.01)
    os.close(writing)
    assert outcry.errors() == ["rank 1 died"]
    assert outcry.errors() == []
    error = b"tpcpu: error: rank 1 died\n"
    assert capfd.readouterr().err.encode() == (WHOLE.replace(error, b"", 1) if withhold else WHOLE) + b"\n"


def test_what_is_no_error_waits_for_nothing(capfd):
    """The bar of a slow phase has no end of line."""
    reading, writing = os.pipe()
    outcry = Outcry(os.fdopen(reading, "rb"), withhold=True)
    os.write(writing, b"reading 3 %")
    deadline, seen = time.monotonic() + 10, ""
    while not seen and time.monotonic() < deadline:
        seen = capfd.readouterr().err
    assert seen == "reading 3 %"
    os.write(writing, b"\ntpcpu: error: without an end")
    os.close(writing)
    assert outcry.errors() == ["without an end"]
