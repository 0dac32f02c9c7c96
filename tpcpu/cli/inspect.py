"""`tpcpu inspect DIR`: what a checkpoint holds, what of it is quantised, and which rank counts work.

Knows its flags. What it says is put together in `description`.
"""

import argparse
from typing import Any

from tpcpu.cli.output import Output


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="what a checkpoint holds, and which rank counts work",
        description="Describe the checkpoint DIR.",
    )
    parser.add_argument("dir", metavar="DIR", help="a Hugging Face folder, or a hub name in the local cache")
    parser.add_argument("--json", action="store_true", help="print the description as one JSON line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from dataclasses import asdict

    from tpcpu.checkpoint import Checkpoint
    from tpcpu.cli.description import describe, text

    output = Output(args.json)
    with Checkpoint.open(args.dir) as checkpoint:
        found = describe(checkpoint)
    output.line(text(found))
    output.result(asdict(found))
    return 0
