"""`tpcpu explain`: the program that one rank of a world runs, with the bytes of every operation. Reads no weights.

Prints layers that are alike once, then what a token costs each rank. With --json, the whole program and all sums.
"""

import argparse
from typing import Any

from tpcpu.cli import flags


def add_parser(subparsers: Any) -> None:
    """Declares the command and its flags."""
    parser = subparsers.add_parser(
        "explain",
        help="print the program of a rank, with bytes; no weights are read",
        description="Prints the program that a rank runs for every token: operations, the part of each weight that the "
        "rank holds, and what that costs. No weights are read.",
        epilog="| marks where the threads of a rank wait for one another, once for each |, before or inside an "
        "operation. Ranges name the first and the last. 1 kB is 1000 bytes.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="a config.json; no weights are needed")
    source.add_argument("--model", metavar="DIR", help="a checkpoint folder, or a hub name found in the local cache")
    parser.add_argument("--ranks", type=flags.positive, default=1, metavar="N", help="size of the world (default: 1)")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose program to print (default: 0)")
    parser.add_argument("--threads", type=flags.positive, metavar="T", help="per rank; tells how evenly work divides")
    parser.add_argument(
        "--context", type=flags.positive, metavar="N",
        help="positions that the cache has room for (default: the smaller of the model's and 8192)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=flags.FORMATS, help="of the weights in memory (default: as stored; nf4 with --config)"
    )
    parser.add_argument(
        "--lm-head",
        choices=flags.HEAD_FORMATS,
        help="of the output head (default: int8 with nf4 and int8 weights, else as the weights)",
    )
    parser.add_argument("--layers", choices=("all",), help="print every layer, alike or not")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")


def run(args: argparse.Namespace) -> int:
    """Prints; always 0. Raises ConfigError, CheckpointError, UsageError, LaunchError."""
    from tpcpu.cli.explanation import explain

    return explain(args)
