"""`tpcpu quantize SRC DST`: write a checkpoint in fewer bits, showing how far it is.

Knows flags and the terminal. The work is `tpcpu.quantize`.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

FORMATS = ("nf4", "int8", "bf16", "float32")


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quantize",
        help="write a checkpoint in 4 or 8 bits",
        description="Write the checkpoint SRC to the new folder DST.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face folder, or a hub name in the local cache")
    parser.add_argument("dst", metavar="DST", help="a folder that does not exist; complete or absent afterwards")
    parser.add_argument("--format", choices=FORMATS, default="nf4", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, metavar="N", help="threads; default: one per core")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from tpcpu.quantize import quantize

    display: _Display = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        report = quantize(args.src, args.dst, args.format, progress=display.show, jobs=args.jobs)
    except KeyboardInterrupt:
        display.close()
        print(f"interrupted; the same command goes on after the files finished in {args.dst}.partial", file=sys.stderr)
        return 130
    finally:
        display.close()
    speed = report.source_bytes / max(report.seconds, 1e-9) / 1e9
    again = f", {report.resumed_files} of them finished before" if report.resumed_files else ""
    print(
        f"{args.dst}: {report.source_bytes / 1e9:.2f} GB became {report.written_bytes / 1e9:.2f} GB ({args.format}) in"
        f" {report.seconds:.1f} s{'' if again else f', {speed:.2f} GB/s'}; files: {report.files}{again}",
        file=sys.stderr,
    )
    for name, reason in report.kept.items():
        print(f"not quantised: {name}: {reason}", file=sys.stderr)
    for name in report.dropped:
        print(f"left out, not needed: {name}", file=sys.stderr)
    if args.json:
        print(json.dumps({"path": args.dst, "format": args.format} | asdict(report)))
    return 0


class _Display(Protocol):
    def show(self, done: int, total: int) -> None: ...
    def close(self) -> None: ...


class _Bar:
    """A bar for a terminal: GB, GB/s, time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def show(self, done: int, total: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = ("quantising", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=total, completed=0)
            self._progress.start()
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class _Lines:
    """A line every few seconds, for logs."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._before: int | None = None

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._before is None:
            self._before = done  # done by an earlier run, or the first piece: no measure of speed
        if now - self._last < self.SECONDS:
            return
        self._last = now
        speed = max(done - self._before, 1) / (now - self._began)
        left = (total - done) / speed
        print(
            f"quantising: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        pass
