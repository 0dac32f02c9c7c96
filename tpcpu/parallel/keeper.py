"""The process between us and `mpiexec`: it outlives both and leaves nothing behind.

Started by `launcher.py` in a session of its own; knows processes, signals and leftovers, must not know MPI or models.
It ends the whole tree when `mpiexec` ends, when it is asked to, or when the pipe to the process that started it closes,
which also happens when that process is killed; descendants cannot slip away, because orphans become its children.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tpcpu.parallel.lifeline import adopt_orphans, die_with_parent
from tpcpu.parallel.segments import launchers_files, named_segments, unlink_orphans

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# these ask for an end; the rest is for the ranks to interpret
_ENDING = (signal.SIGTERM, signal.SIGHUP)

_WITNESS_SECONDS = 1.0
"""For a witness to tell what it saw, and to take away what the launcher left."""


def main() -> None:
    """`LIFELINE GRACE FOLDER COMMAND…`: run COMMAND with TMPDIR=FOLDER, then remove that; exits with its code."""
    lifeline, grace, folder, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]
    os.set_inheritable(lifeline, False)
    adopt_orphans()
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    older = named_segments() | launchers_files()
    try:
        child = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": folder}, start_new_session=True, preexec_fn=die_with_parent
        )
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"tpcpu: cannot start {command[0]}: {error.strerror}")
    code = _watch(child, lifeline, woken, grace)
    end_descendants()
    if code:
        unlink_orphans(older)
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code if code >= 0 else 128 - code)


def _watch(child: subprocess.Popen[bytes], lifeline: int, woken: int, grace: float) -> int:
    """Wait for the command's end, pass signals on, and put an end to it when asked or abandoned."""
    deadline = float("inf")
    watched = [lifeline, woken]
    while (code := child.poll()) is None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            child.kill()
            return child.wait()
        # SIGCHLD wakes the wait; the second is for a wake-up lost between poll and select
        ready, _, _ = select.select(watched, [], [], min(remaining, 1.0))
        numbers: list[int] = []
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                numbers = list(os.read(woken, 64))
        if lifeline in ready:
            watched.remove(lifeline)
            numbers.append(signal.SIGTERM)
        for number in numbers:
            if number in FORWARDED:
                child.send_signal(number)
            if number in _ENDING:
                deadline = min(deadline, time.monotonic() + grace)
    return code


def end_descendants() -> None:
    """Kill what is left of the tree and collect it; returns when nothing is left, or after two seconds."""
    deadline = time.monotonic() + 2.0
    spared = time.monotonic() + _WITNESS_SECONDS
    while time.monotonic() < deadline:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children:
            # which ends by itself, after it has told what happened
            if time.monotonic() < spared and _is_witness(child):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _is_witness(child: str) -> bool:
    with contextlib.suppress(OSError):
        return b"witness.main()" in Path(f"/proc/{child}/cmdline").read_bytes()
    return False
