"""Flags that several commands share, each declared once: how a model is loaded and run, how tokens are sampled.

Knows names, kinds and help of the flags. What a value means to a model, and whether it is possible for one, is said by
those who use it; here a value only has to be of its kind.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpcpu.sampling import SamplingParams

FORMATS = ("nf4", "int8", "bf16", "float32")
HEAD_FORMATS = ("int8", "bf16", "nf4")
KV_CACHES = ("float32", "bf16", "int8")
ALL_REDUCES = ("window", "mpi")
WIRES = ("float32", "bf16")
READS = ("shared", "local")


def model_flags(parser: argparse.ArgumentParser, *, measured: bool = False) -> None:
    """Adds the flags of every command that loads a model and runs it.

    `measured`: a config alone may stand for a model, and --all-reduce may be a number of bytes instead of a kind.
    """
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="a checkpoint folder, or a hub name found in the local cache")
    if measured:
        source.add_argument("--config", metavar="FILE", help="a config.json; needs --fake-weights")
        model.add_argument("--fake-weights", action="store_true", help="random weights in the shapes of the config")
    model.add_argument("--format", choices=FORMATS, help="of the weights in memory (default: as stored)")
    model.add_argument(
        "--lm-head",
        choices=HEAD_FORMATS,
        help="format of the output head (default: int8 with nf4 and int8 weights, else as stored)",
    )
    model.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer (default: the smaller of the model's and 8192)",
    )
    model.add_argument("--exact", action="store_true", help="float32 arithmetic; slower, for comparisons")
    run = parser.add_argument_group("running")
    run.add_argument(
        "--ranks",
        type=rank_count,
        default="auto",
        metavar="N",
        help="MPI ranks to start, or auto: one per socket or sub-NUMA node; under mpiexec, the ranks that it started",
    )
    run.add_argument(
        "--threads", type=positive, metavar="N", help="per rank (default: the physical cores of the rank's socket)"
    )
    run.add_argument("--chunk-tokens", type=positive, metavar="N", help="prompt tokens that one step takes")
    run.add_argument("--page-tokens", type=positive, metavar="N", help="tokens in a page of the cache")
    run.add_argument(
        "--cache-tokens",
        type=positive,
        metavar="N",
        help="tokens that the cache holds, of all sequences (default: 4 contexts, at most half of the free memory)",
    )
    run.add_argument(
        "--kv-cache", choices=KV_CACHES, help="format of keys and values (default: bf16; float32 under --exact)"
    )
    kinds = (
        "window: through shared memory, parts added in rank order; mpi: plain MPI_Allreduce, which promises no order"
    )
    if measured:
        run.add_argument(
            "--all-reduce", type=kind_or_bytes, default="window", metavar="KIND|BYTES",
            help=f"{kinds} (default: window); or time both for a message of so many bytes",
        )  # fmt: skip
    else:
        run.add_argument("--all-reduce", choices=ALL_REDUCES, default="window", help=f"{kinds} (default: window)")
    run.add_argument(
        "--wire", choices=WIRES, default="float32", help="what sums travel as between hosts (default: float32)"
    )
    run.add_argument(
        "--read", choices=READS,
        help="shared: the hosts see one folder, read once by all ranks together; local: each host reads its own copy "
        "(default: found out)",
    )  # fmt: skip
    run.add_argument(
        "--fault-timeout", type=seconds, default=10.0, metavar="SECONDS",
        help="in which a lost or stopped rank becomes an error (default: 10)",
    )  # fmt: skip
    run.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")


def speculation_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that answer: how they go about it changes no answer."""
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="draft up to N tokens from what the text said before, and verify them in one step (default: 0)",
    )


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of sampling; their names are those of SamplingParams, and what is not given stays None."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens of the answer at most")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that hold probability P")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens of at least P times the likeliest's")
    group.add_argument("--repetition-penalty", type=float, metavar="F", help="above 1: tokens seen become unlikelier")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="taken once from logits of answered tokens")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="taken once per time of having answered")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be given several times")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the model's own end")


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """SamplingParams of the flags that were given, its defaults for the others.

    A command's own flags count where they bear a field's name (--logprobs). Raises SamplingError for impossible values.
    """
    from tpcpu.sampling import SamplingParams

    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return SamplingParams(**{name: getattr(args, name) for name in names if getattr(args, name, None) is not None})


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return value


def seconds(text: str) -> float:
    """A finite number of seconds, at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of seconds, at least 1")
    return value


def rank_count(text: str) -> int | str:
    """A whole number of at least 1, or the word auto."""
    if text == "auto":
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1, or auto") from None


def kind_or_bytes(text: str) -> str | int:
    """One of the ways to join ranks, or the bytes of a message of float32."""
    if text in ALL_REDUCES:
        return text
    if text.isascii() and text.isdecimal() and int(text) > 0 and int(text) % 4 == 0:
        return int(text)
    kinds = ", ".join(ALL_REDUCES)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected {kinds}, or a number of bytes that 4 divides")
