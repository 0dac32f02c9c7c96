"""`tpcpu inspect DIR`: what a checkpoint holds, what of it is quantised, and which rank counts work.

Knows its flags. What it says is put together in `description`.
"""

import argparse
from typing import TYPE_CHECKING, Any

from tpcpu.cli.output import Output

if TYPE_CHECKING:
    from tpcpu.checkpoint import Checkpoint


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="what a checkpoint holds, and which rank counts work",
        description="Describe the checkpoint DIR.",
    )
    parser.add_argument(
        "dir", metavar="DIR", help="a Hugging Face folder, a hub name in the local cache, or a GGUF file"
    )
    parser.add_argument("--json", action="store_true", help="print the description as one JSON line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from dataclasses import asdict

    from tpcpu.cli.description import describe, text

    output = Output(args.json)
    with _open(args.dir) as checkpoint:
        found = describe(checkpoint)
    output.line(text(found))
    output.result(asdict(found))
    return 0


def _open(path: str) -> "Checkpoint":
    if path.endswith(".gguf"):
        from tpcpu.quantize import open_source  # which needs the kernels, and these take a while

        return open_source(path)
    from tpcpu.checkpoint import Checkpoint

    return Checkpoint.open(path)
