"""A step enters compiled code once, and allocates nothing. Each detector is shown something that it has to find."""

import ctypes
import gc
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from tests.kernels.binding import EVERYTHING, Bound, FakeRanks
from tests.kernels.test_joining import held
from tests.models.tiny import load
from tpcpu.kernels import compile as compiling
from tpcpu.parallel.partition import Share
from tpcpu.parallel.team import Team
from tpcpu.program.batch import Batch

MODELS = ("llama-tiny", "yuan-tiny")


def bind(name, team, size=1, **settings):
    tiny = load(name)
    program, tensors = tiny.model.program(Share(0, size)), held(tiny, "nf4")
    return Bound(program, tensors, team, context=512, page_tokens=64, sequences=1, **settings)


def decode(bound, batch, steps):
    """Token after token in one batch's memory, as the engine does it."""
    for _ in range(steps):
        bound.compiled.run(batch)
        batch.positions[0] += 1
        batch.tokens[0] = (7 * batch.tokens[0] + 11) % 4000


def first_batch(bound):
    sequence = bound.sequences[0]
    bound.cache.reserve(sequence, 512)
    return Batch.build([([1], 0, sequence.state, sequence.pages)], [0], **EVERYTHING)


class Watcher:
    """Notes every Python function that any thread enters while `Team.walk` is on its way."""

    def __init__(self):
        self.inside, self.seen, self.runs = False, [], 0

    def __call__(self, frame, event, _argument):
        if frame.f_code is Team.walk.__code__:
            self.runs += event == "call"
            self.inside = event in ("call", "c_call", "c_return", "c_exception")
        elif event == "call" and self.inside:
            self.seen.append(frame.f_code.co_qualname)


def watch(make):
    """What a watcher sees of 5 steps, decoding and more, of `make(team)`; workers are watched from their start."""
    watcher = Watcher()
    threading.setprofile(watcher)
    try:
        team = Team(range(2), pinned=False)
    finally:
        threading.setprofile(None)
    try:
        bound = make(team)
        batch = first_batch(bound)
        long = Batch.build([(list(range(9)), 0, 0, bound.sequences[0].pages)], [8], **EVERYTHING)
        sys.setprofile(watcher)
        try:
            decode(bound, batch, 4)
            bound.compiled.run(long)
        finally:
            sys.setprofile(None)
    finally:
        team.close()
    return watcher


@pytest.mark.parametrize("name", MODELS)
def test_a_step_enters_compiled_code_once(name):
    watcher = watch(lambda team: bind(name, team))
    assert watcher.runs == 5
    assert watcher.seen == []


def test_the_watcher_sees_python_inside_a_step():
    """With ranks that are joined by a Python function, it finds that function: two all-reduces a layer, and no more."""
    ranks = FakeRanks(2)
    watcher = watch(lambda team: bind("llama-tiny", team, 2, all_reduce=ranks.ordered))
    entered = [name for name in watcher.seen if name.endswith("gather")]
    assert len(entered) == 5 * 2 * 6


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
if hasattr(LIBC, "mallinfo2"):
    LIBC.mallinfo2.restype = Mallinfo


def native_bytes():
    """Bytes in use of the C library's heap, mappings of large blocks included."""
    if not hasattr(LIBC, "mallinfo2"):
        pytest.skip("needs the GNU C library's mallinfo2")
    info = LIBC.mallinfo2()
    return info.uordblks + info.hblkhd


def growth(bound, batch, between=lambda: None):
    """Bytes that 100 decode steps leave behind, of Python and of the C library: the least of several times.

    What steps leave they leave every time; free lists settle, and what other tests left behind ends, once.
    """
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        found = []
        for _ in range(5):
            python, native = tracemalloc.get_traced_memory()[0], native_bytes()
            decode(bound, batch, 50)
            between()
            decode(bound, batch, 50)
            found.append((tracemalloc.get_traced_memory()[0] - python, native_bytes() - native))
        return tuple(map(min, zip(*found, strict=True)))
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_a_hundred_steps_allocate_nothing(teams, name, exact):
    bound = bind(name, teams[1], exact=exact)
    python, native = growth(bound, first_batch(bound))
    # A step cannot leave less behind than the smallest object; what is here comes and goes in free lists.
    assert python < 100 * 16
    assert native < 100 * 16


def test_growth_is_seen(teams):
    """One small block a step, kept, in either heap, is more than the limits above."""
    bound = bind("llama-tiny", teams[1])
    batch = first_batch(bound)
    kept = []
    python, _ = growth(bound, batch, lambda: kept.extend(bytearray(1) for _ in range(100)))
    assert python > 100 * 16
    batch.positions[0] = 0
    blocks = []
    _, native = growth(bound, batch, lambda: blocks.extend(LIBC.malloc(24) for _ in range(100)))
    for block in blocks:
        LIBC.free(ctypes.c_void_p(block))
    assert native > 100 * 16


def test_no_kernel_calls_an_allocator(teams, tmp_path):
    """Compiled code that takes memory calls numba's runtime by name: no kernel that was compiled here does."""
    bind("llama-tiny", teams[0])
    bind("yuan-tiny", teams[0], exact=True)
    allocators = (b"NRT_Allocate", b"NRT_MemInfo_alloc", b"NRT_allocate")

    def calls(folder):
        found = sorted(folder.rglob("*.nbc"))
        return [path.name for path in found if any(name in path.read_bytes() for name in allocators)], len(found)

    callers, looked_at = calls(compiling.folder())
    assert looked_at > 10
    assert callers == []
    numba = pytest.importorskip("numba")
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(tmp_path)
    try:
        numba.njit("float64(int64)", cache=True)(takes_memory)
    finally:
        numba.config.CACHE_DIR = before
    assert calls(tmp_path)[0]


def takes_memory(count):
    return np.ones(count).sum()
