"""Compiling kernels, and keeping what was compiled.

numba's own cache has two traps: it does not notice a change in another file, and two processes that write it at once
can leave one function's code under another's name. So the folder is named after everything that code depends on, and
each function, whose files in the cache are its own, is compiled by one process, under a lock of that function.
Processes that start together, the ranks of a host for one, compile different functions and load one another's.

The only place that sets compile options.
"""

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, njit, types
from numba.core import codegen

from tpcpu.errors import UsageError
from tpcpu.kernels import isa

_config: Any = numba.config  # its attributes are made at run time

_SIGNATURE = types.void(types.int64, types.int64, types.int64)

_chosen = isa.selected()
if isa.forced():
    # A forced set must not meet instructions of a better one, and is compiled alike wherever it is forced: the compiler
    # gets a CPU of that set for its target.
    _config.CPU_NAME = _chosen.cpu or "generic"
    _config.CPU_FEATURES = _chosen.features


def named(function: Any, name: str) -> Any:
    """Gives a function that closes over numbers a name of its own, unique among all that are compiled.

    LLVM takes functions of one name for one function, whichever it met first. numba tells them apart by a counter of
    each process, and what comes from the cache was counted by another one: variants of a closure, which share a name,
    would then be taken for each other.
    """
    function.__name__ = function.__qualname__ = name.replace("-", "_")
    return function


class Kernel:
    """A function (record, thread, threads) that is compiled, or found compiled, when its address is first needed.

    A kernel takes no lock, allocates nothing and raises nothing. Nothing about floating point is relaxed: where a
    multiply and an add are one instruction, the kernel says `fma`.
    """

    def __init__(self, function: Callable[[int, int, int], None], name: str) -> None:
        self.name = name
        self._function = named(function, name)
        self._compiled: Any = None

    @property
    def address(self) -> int:
        prepare([self])
        return int(self._compiled.address)

    @property
    def ready(self) -> bool:
        """Whether this process has it."""
        return self._compiled is not None

    def _compile(self, *, wait: bool = True) -> bool:
        """Not done, and False, where another process is at it and we do not wait for it."""
        with _filling(self.name, wait=wait) as ours:
            if ours:
                self._compiled = cfunc(_SIGNATURE, cache=True, error_model="numpy")(self._function)
        return ours


_spent: list[float] = []

helper = njit(error_model="numpy")
"""Decorates a function that kernels call; it is compiled into each of them."""


def kernel(name: str) -> Callable[[Callable[[int, int, int], None]], Kernel]:
    """Makes a function a `Kernel`; `name` is unique among all kernels."""
    return lambda function: Kernel(function, name)


def function(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function that Python calls, or finds it compiled, when it is defined. It runs without the GIL."""

    def decorate(python: Callable[..., Any]) -> Any:
        with _filling(f"function-{python.__name__}"):
            return njit(signature, nogil=True, cache=True, error_model="numpy")(python)

    return decorate


def prepare(kernels: Iterable[Kernel], report: Callable[[str], None] | None = None) -> None:
    """Compiles those kernels that this machine has not compiled yet, and loads the others.

    `report` is told when compiling begins and how long it took.
    """
    wanted = [each for each in kernels if not each.ready]
    missing = sum(not _is_compiled(each.name) for each in wanted)
    if missing and report:
        report(f"compiling {missing} kernels for {_chosen.name}, once per machine")
    begin = time.monotonic()
    # What another process is compiling comes last: until then there may be something to compile beside it.
    for each in [each for each in wanted if not each._compile(wait=False)]:
        each._compile()
    _spent.append(time.monotonic() - begin)
    if missing and report:
        report(f"compiled in {time.monotonic() - begin:.1f} s")


def spent_seconds() -> float:
    """What this process has spent so far on compiling kernels, and on loading those that it found compiled."""
    return sum(_spent)


@contextmanager
def _filling(name: str, *, wait: bool = True) -> Iterator[bool]:
    """Around the compiling of one function: alone on this machine, unless the cache has it already.

    Gives False where another process is compiling it and we do not wait.
    """
    with _numba_cache_dir():
        if _is_compiled(name):
            yield True
            return
        with _marker(name).open("a") as marker:
            try:
                fcntl.flock(marker, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
            if not _is_compiled(name):
                marker.write("in the cache\n")


def _marker(name: str) -> Path:
    """The lock of a function, with something in it once the function is completely in the cache."""
    return folder() / f"{name}.compiled"


def _is_compiled(name: str) -> bool:
    try:
        return _marker(name).stat().st_size > 0
    except FileNotFoundError:
        return False


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.rglob("*.py"))


@cache
def folder() -> Path:
    """Where compiled kernels are kept: `TPCPU_CACHE_DIR`, or the user's cache folder.

    Named after the sources with their place and time (numba compares these), the versions of numba and Python, and
    the compiler's target, which is this CPU where no set is forced: a home directory may be shared by unlike machines.
    Raises UsageError where it cannot be made.
    """
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(f"{source} {source.stat().st_mtime_ns}\n".encode())
        digest.update(source.read_bytes())
    target = (_config.CPU_NAME, _config.CPU_FEATURES) if isa.forced() else _host()
    digest.update(repr((numba.__version__, sys.version, _chosen.name, *target)).encode())
    root = os.environ.get("TPCPU_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tpcpu"
    path = Path(root).expanduser().absolute() / f"kernels-{_chosen.name}-{digest.hexdigest()[:16]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path.parent}: compiled kernels cannot be kept there ({error.strerror}); "
            f"set TPCPU_CACHE_DIR to a folder that you may write to"
        ) from error
    return path


def _host() -> tuple[str, str]:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), codegen.get_host_cpu_features()


@contextmanager
def _numba_cache_dir() -> Iterator[None]:
    """numba fixes a function's cache folder when it is decorated; the user's own functions keep theirs."""
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(folder())
    try:
        yield
    finally:
        _config.CACHE_DIR = before
