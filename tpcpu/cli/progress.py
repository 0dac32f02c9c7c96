"""How far a slow phase is, on standard error: a bar on a terminal, a line every few seconds in a log.

Knows bytes and answers, time and the terminal; not what is being done.
"""

import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tpcpu.cli.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress

SLOW_SECONDS = 0.5
"""What is over sooner is not worth a bar."""

LINE_SECONDS = 5.0


class ByteProgress:
    """Shows bytes done of all there are, GB/s and the time left; nothing for what takes no time."""

    def __init__(self, phase: str, output: Output) -> None:
        """`phase` says what is being done, such as `reading`."""
        self._phase, self._output = phase, output
        self._began: float | None = None
        self._told = 0.0
        self._before = 0
        self._bar: Progress | None = None

    def show(self, done: int, total: int) -> None:
        """To be called as the work goes on."""
        now = time.monotonic()
        if self._began is None:
            # What was done by an earlier run, or before the first call, is no measure of speed.
            self._began = self._told = now
            self._before = done
        if done >= total:
            # Whoever works says how it went; nothing must be in the way.
            self.close()
            return
        if not self._output.speaks or now - self._began < SLOW_SECONDS:
            return
        if sys.stderr.isatty():
            self._show_bar(done, total)
        elif now - self._told >= LINE_SECONDS:
            self._told = now
            speed = max(done - self._before, 1) / (now - self._began)
            left = (total - done) / speed
            self._output.note(
                f"{self._phase}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left"
            )

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (self._phase, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)


class AnswerProgress(AbstractContextManager["AnswerProgress"]):
    """Shows answers done of all there are, tokens a second and the time left."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._began = self._told = time.monotonic()
        self._before: int | None = None
        self._bar: Progress | None = None

    def show(self, done: int, total: int, tokens: int) -> None:
        """To be called as the work goes on. `tokens` are those of this run."""
        now = time.monotonic()
        if self._before is None:
            self._before = done
        if not self._output.speaks:
            return
        speed = f"{tokens / (now - self._began):.0f} tokens/s"
        if sys.stderr.isatty():
            self._show_bar(done, total, speed)
        elif now - self._told >= LINE_SECONDS:
            self._told = now
            rate = (done - self._before) / (now - self._began)
            left = f", {(total - done) / rate:.0f} s left" if rate else ""
            self._output.note(f"answers: {done} of {total}, {speed}{left}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, done: int, total: int, speed: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("answers", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total, completed=done, speed=speed)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, speed=speed)
