"""`tpcpu bench`: how fast a model is on this machine, beside how fast the machine could be.

Knows flags, and how to start the ranks that it needs; the measuring is in `tpcpu.bench`.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from tpcpu.cli.flags import model_flags, positive, speculation_flag
from tpcpu.cli.output import Output
from tpcpu.errors import LaunchError, UsageError


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure a model's speed, and the machine's",
        description="Measures loading, prompt and answer of a model, real or made of random weights, and in the same "
        "run what this machine reads and computes at best. Medians; a warm-up is left out.",
    )
    model_flags(parser, measured=True)
    speculation_flag(parser)
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--prompt-tokens", type=several, default=(128,), metavar="P[,P...]",
        help="of each request; of several lengths one after another (default: 128)",
    )  # fmt: skip
    group.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    group.add_argument("--runs", type=positive, default=5, metavar="R", help="the median counts (default: %(default)s)")
    group.add_argument("--batch", type=positive, default=1, metavar="B", help="requests at a time (default: 1)")
    group.add_argument(
        "--cached-tokens", type=positive, metavar="C",
        help="time a prompt, too, whose first C tokens another one has left in the cache",
    )  # fmt: skip
    group.add_argument(
        "--replay", metavar="FILE",
        help="with --speculate: a text that prompt and answer are taken from, whatever the model chooses; a list of "
        "token ids in JSON, or text, read by the model's tokenizer or by --tokenizer's",
    )  # fmt: skip
    group.add_argument("--tokenizer", metavar="DIR", help="a folder with a tokenizer for --replay")
    group.add_argument("--operations", action="store_true", help="a table of operations: time, bytes, GB/s, share")
    group.add_argument(
        "--as-rank", type=rank_of, metavar="R/N",
        help="rank R of an N-rank job alone in this process, exchanges replaced by local copies",
    )  # fmt: skip
    group.add_argument("--no-exchange", action="store_true", help="all ranks, but exchanges replaced by local copies")


def several(text: str) -> tuple[int, ...]:
    """One or more positive numbers, separated by commas."""
    return tuple(positive(part) for part in text.split(","))


def rank_of(text: str) -> tuple[int, int]:
    """R/N with 0 <= R < N."""
    rank, slash, size = text.partition("/")
    if slash and rank.isascii() and size.isascii() and rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return int(rank), int(size)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected R/N with R from 0 to N - 1, such as 0/4")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.fake_weights != (args.config is not None):
        raise UsageError("--config and --fake-weights belong together: without a folder, weights are made up")
    if args.fake_weights and args.read is not None:
        raise UsageError(
            f"--read {args.read} says how a folder is read; with --fake-weights there is none: leave it out"
        )
    if (args.replay is not None) != bool(args.speculate):
        raise UsageError("--speculate and --replay belong together: a model of its own accord proves nothing in a loop")
    from tpcpu.parallel import launcher

    if launcher.in_launcher():
        return _measure(args)
    ranks = _ranks(args)
    return _measure(args) if ranks == 1 else _start(args, ranks)


def _ranks(args: argparse.Namespace) -> int:
    from tpcpu.parallel.topology import Topology

    if args.as_rank is not None:
        if args.ranks not in ("auto", 1):
            raise UsageError(f"--as-rank runs in one process; leave --ranks {args.ranks} out")
        return 1
    if isinstance(args.all_reduce, int) and args.ranks == 1:
        raise UsageError(f"--all-reduce {args.all_reduce} measures what joins ranks; it needs --ranks 2 or more")
    return Topology.detect().default_ranks() if args.ranks == "auto" else int(args.ranks)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    from tpcpu.checkpoint.folder import read_json

    path = Path(args.config).expanduser()
    return read_json(path / "config.json" if path.is_dir() else path)


def _start(args: argparse.Namespace, ranks: int) -> int:
    """The same command again, on ranks that are started for it."""
    from tpcpu.checkpoint import Checkpoint
    from tpcpu.models import read_config
    from tpcpu.parallel import launcher
    from tpcpu.parallel.partition import Share

    # Whatever the config tells about itself is found out before anything is started.
    if args.config is not None:
        config = _config(args)
    else:
        with Checkpoint.open(args.model) as checkpoint:
            config = checkpoint.config
    read_config(config).program(Share(0, ranks))
    # -P: a file in this folder must not stand in for a module that the ranks import.
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tpcpu.cli import main; sys.exit(main())"
    argv = [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2]), *args.arguments]
    return launcher.run(ranks, argv, stdin=subprocess.DEVNULL)


def _measure(args: argparse.Namespace) -> int:
    from tpcpu.bench.measure import measure
    from tpcpu.bench.settings import Settings
    from tpcpu.bench.times import table_lines
    from tpcpu.cli.loading import Loading
    from tpcpu.engine.engine import DEFAULT_MAX_BATCH, DEFAULT_PAGE_TOKENS, Options
    from tpcpu.engine.fake import FakeWeights
    from tpcpu.parallel.communicator import connect
    from tpcpu.parallel.partition import Share

    output = Output(args.json)
    message_bytes = args.all_reduce if isinstance(args.all_reduce, int) else None
    communicator = connect("window" if message_bytes else args.all_reduce, fault_timeout=args.fault_timeout)
    if args.ranks not in ("auto", communicator.size):
        raise LaunchError(
            f"{args.ranks} ranks asked for, but the launcher started {communicator.size}; "
            f"leave the number to the launcher"
        )
    if args.as_rank is not None and communicator.size > 1:
        raise UsageError(f"--as-rank runs in one process, but the launcher started {communicator.size}")
    given = ("chunk_tokens", "page_tokens", "cache_tokens", "speculate")
    chosen = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    if args.batch > 1:
        # As much as all of them need, and the page that each is left to grow when another is let in; what a default
        # leaves out of account is how many there are.
        page = args.page_tokens or DEFAULT_PAGE_TOKENS
        needed = (-(-(max(args.prompt_tokens) + args.new_tokens + 1) // page) + 1) * page
        chosen.setdefault("cache_tokens", max(args.batch * needed, args.context or 0))
    options = Options(
        args.format, args.lm_head, args.exact, args.context, args.threads, kv_cache=args.kv_cache, wire=args.wire,
        read=args.read, exchange=not args.no_exchange and args.as_rank is None,
        share=Share(*args.as_rank) if args.as_rank is not None else None,
        max_batch=max(args.batch, DEFAULT_MAX_BATCH), **chosen,
    )  # fmt: skip
    settings = Settings(
        args.prompt_tokens, args.new_tokens, args.runs, args.batch, args.cached_tokens, _replayed(args), message_bytes
    )
    name = Path(args.config or args.model).expanduser()
    source = FakeWeights(_config(args)) if args.config is not None else args.model
    with Loading(output) as progress:
        reports = measure(
            name.parent.name if name.name == "config.json" else name.stem if args.config else name.name,
            source, communicator, options, settings, progress, output.note,
        )  # fmt: skip
    for report in reports:
        for line in report.lines:
            output.line(line)
        if args.operations:
            for line in [
                "a step of answers:", *table_lines(report.operations, report.step),
                "a token of a prompt:", *table_lines(report.prefill_operations, report.prefill_step),
            ]:  # fmt: skip
                output.line(line)
            report.result["operations"] = [vars(row) for row in report.operations]
            report.result["prefill_operations"] = [vars(row) for row in report.prefill_operations]
    sweep = {"sweep": [report.result for report in reports]} if len(reports) > 1 else {}
    output.result(reports[0].result | sweep)
    return 0


def _replayed(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The tokens of --replay. Raises UsageError."""
    if args.replay is None:
        return None
    import json

    from tpcpu.checkpoint import Checkpoint
    from tpcpu.text import load_tokenizer

    try:
        text = Path(args.replay).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--replay {args.replay}: cannot be read as text ({error})") from error
    if text.lstrip().startswith("["):
        try:
            ids = json.loads(text)
        except ValueError as error:
            raise UsageError(
                f"--replay {args.replay}: begins as a list of token ids, but is no JSON ({error})"
            ) from error
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UsageError(f"--replay {args.replay}: found something else than token ids in the list")
        return tuple(ids)
    if args.tokenizer is not None:
        return tuple(load_tokenizer(args.tokenizer, {}).encode(text))
    if args.model is None:
        raise UsageError("--replay with text needs a tokenizer: add --tokenizer DIR, or give a JSON list of token ids")
    with Checkpoint.open(args.model) as checkpoint:
        return tuple(load_tokenizer(checkpoint.path, checkpoint.config).encode(text))
