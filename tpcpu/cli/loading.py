"""Loading a model for a command, with its slow phases shown on standard error.

Knows the flags of `flags.model_flags`; the model is `tpcpu.LLM`.
"""

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tpcpu.cli.output import Output
from tpcpu.cli.progress import ByteProgress

if TYPE_CHECKING:
    from tpcpu.llm import LLM


def load(args: argparse.Namespace, output: Output) -> "LLM":
    """The model of the command's flags. Raises UserErrors."""
    from tpcpu.llm import LLM

    given = ("chunk_tokens", "page_tokens", "cache_tokens", "speculate")
    chosen = {name: getattr(args, name) for name in given if getattr(args, name, None) is not None}
    with Loading(output) as progress:
        return LLM(
            args.model, args.ranks, args.format, args.lm_head, args.exact, args.context,
            threads=args.threads, kv_cache=args.kv_cache, all_reduce=args.all_reduce, wire=args.wire,
            read=args.read, fault_timeout=args.fault_timeout, progress=progress, **chosen,
        )  # fmt: skip


class Loading(AbstractContextManager["Loading"]):
    """What the engine tells while it loads: see `tpcpu.engine.progress`."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bytes = ByteProgress("reading", output)

    def say(self, line: str) -> None:
        """One line about what happens now."""
        self._output.note(line)

    def advance(self, done: int, total: int) -> None:
        """Bytes of weights read so far, and all there are to read."""
        self._bytes.show(done, total)

    def __exit__(self, *_: object) -> None:
        self._bytes.close()
