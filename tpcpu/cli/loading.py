"""Loading a model for a command, with its slow phases shown on standard error.

Knows the flags of `flags.model_flags` and the terminal; the model is `tpcpu.LLM`.
"""

import argparse
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tpcpu.cli.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from tpcpu.llm import LLM

_SLOW_SECONDS = 0.5
"""A phase that is over sooner is not worth a bar."""


def load(args: argparse.Namespace, output: Output) -> "LLM":
    """The model of the command's flags. Raises UserErrors."""
    from tpcpu.llm import LLM

    given = ("chunk_tokens", "page_tokens")
    chosen = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    with Loading(output) as progress:
        return LLM(
            args.model, args.ranks, args.format, args.lm_head, args.exact, args.context,
            threads=args.threads, kv_cache=args.kv_cache, all_reduce=args.all_reduce, progress=progress, **chosen,
        )  # fmt: skip


class Loading(AbstractContextManager["Loading"]):
    """A bar of bytes read on a terminal, a line now and then elsewhere; nothing for what takes no time."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._began = self._told = 0.0
        self._bar: Bar | None = None

    def say(self, line: str) -> None:
        """One line about what happens now."""
        self._output.note(line)

    def advance(self, done: int, total: int) -> None:
        """Bytes of weights read so far, and all there are to read."""
        now = time.monotonic()
        self._began = self._began or now
        seconds = now - self._began
        if not self._output.speaks or seconds < _SLOW_SECONDS:
            return
        if sys.stderr.isatty():
            self._show(done, total)
        elif now - self._told > 5 or done == total:
            self._told = now
            speed = done / seconds
            left = "" if done == total else f", {(total - done) / speed:.0f} s left"
            self._output.note(f"read {done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s{left}")

    def _show(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress("reading", *columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
