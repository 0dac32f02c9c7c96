"""`tpcpu batch`: the prompts of a file, answered into another; run again after whatever ended it, it goes on.

Knows flags, streams and signals, and which rank does what. The work is in `tpcpu.batch`.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcpu.cli.flags import model_flags, positive, sampling_flags, sampling_params, speculation_flag
from tpcpu.cli.output import Output
from tpcpu.cli.stopping import Stop, Stopped
from tpcpu.errors import EXIT_STOPPED, LaunchError, TpcpuError, UsageError

if TYPE_CHECKING:
    from tpcpu.batch.runner import Outcome
    from tpcpu.batch.source import Source
    from tpcpu.batch.store import Store
    from tpcpu.engine.engine import Options
    from tpcpu.engine.scheduler import Scheduler
    from tpcpu.sampling import SamplingParams
    from tpcpu.text import Tokenizer

_MISTAKE = 2
"""The highest exit code that tells of something else than a signal."""

_GRACE_SECONDS = 60.0
"""For ranks to finish a step and write their state out, however large the model and slow the disk."""


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "batch",
        help="answer the prompts of a file; resumable",
        description="Answer every line of IN, JSON objects with id, prompt or messages, and sampling keys in OpenAI's "
        "names, or OpenAI's batch format, and write answers to OUT as they finish. Bad lines go to OUT.errors.jsonl. "
        "The same command goes on where it was stopped, in the middle of answers. The flags of sampling are for "
        "lines that do not say otherwise. Exit codes: 0 all lines done; 75 stopped by SIGTERM, SIGHUP or SIGUSR1, "
        "run it again; 130 Ctrl-C, the same; 1 a failure; 2 a mistake.",
    )
    parser.add_argument("--input", metavar="IN", required=True, help="JSON lines")
    parser.add_argument("--output", metavar="OUT", required=True, help="JSON lines; OUT.journal is kept beside it")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run wrote to OUT")
    model_flags(parser)
    running = parser.add_argument_group("batch")
    running.add_argument("--max-batch", type=positive, metavar="N", help="requests at a time (default: 16)")
    speculation_flag(parser)
    sampling_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    stop = Stop()
    try:
        with stop.raising():
            return _run_or_start(args, stop)
    except Stopped:
        return EXIT_STOPPED
    except Exception:
        if stop.has_raised:
            return stop.exit_code
        raise


def _run_or_start(args: argparse.Namespace, stop: Stop) -> int:
    from tpcpu.parallel import launcher
    from tpcpu.parallel.topology import Topology

    params = sampling_params(args)
    if not launcher.in_launcher():
        ranks = Topology.detect().default_ranks() if args.ranks == "auto" else args.ranks
        if ranks > 1:
            return _start(args, ranks, stop)
    return _answer(args, params, stop)


def _start(args: argparse.Namespace, ranks: int, stop: Stop) -> int:
    """The same command again, on ranks that are started for it: rank 0 reads, decides and writes."""
    from tpcpu.checkpoint import Checkpoint
    from tpcpu.models import read_config
    from tpcpu.parallel import launcher
    from tpcpu.parallel.partition import Share

    # Whatever the config tells about itself is found out before anything is started.
    with Checkpoint.open(args.model) as checkpoint:
        read_config(checkpoint.config).program(Share(0, ranks))
    # -P: a file in this folder must not stand in for a module that the ranks import.
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tpcpu.cli import main; sys.exit(main())"
    argv = [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2]), *args.arguments]
    with (
        launcher.start(ranks, argv, stdin=subprocess.DEVNULL, grace=_GRACE_SECONDS) as job,
        job.forwarding(),
        stop.passing_on(job.send_signal),
    ):
        ended = job.wait()
    # Ranks that were only just starting die of the signal.
    return stop.exit_code if stop.asked() and ended > _MISTAKE else ended


def _answer(args: argparse.Namespace, params: "SamplingParams", stop: Stop) -> int:
    """One rank's part of the job."""
    from tpcpu.cli.loading import Loading
    from tpcpu.engine.local import Local
    from tpcpu.parallel.communicator import connect

    output = Output(args.json)
    with stop.raising():
        communicator = connect(args.all_reduce, fault_timeout=args.fault_timeout)
        if args.ranks not in ("auto", communicator.size):
            raise LaunchError(
                f"{args.ranks} ranks asked for, but the launcher started {communicator.size}; "
                f"leave the number to the launcher"
            )
    root = _Root(args, params, output, stop) if communicator.is_root else None
    try:
        with stop.raising():
            begun = communicator.broadcast_object(root.open() if root is not None else None)
            if begun.code is not None:
                return root.end(begun.code) if root is not None else begun.code
            with Loading(output) as progress:
                model = Local(args.model, _options(args, begun.context), communicator, progress)
        with stop.noting():
            # The others follow, and end with the code that rank 0 found.
            code = model.together(lambda scheduler, tokenizer: _run(root, scheduler, tokenizer, model.info.context))
            slow = [asdict(each) for each in model.slow_ranks]
            model.close()
            return root.end(code, slow) if root is not None else code
    finally:
        if root is not None:
            root.close()


def _run(root: "_Root | None", scheduler: "Scheduler", tokenizer: "Tokenizer", context: int) -> int:
    assert root is not None
    return root.run(scheduler, tokenizer, context)


def _options(args: argparse.Namespace, context: int | None) -> "Options":
    from tpcpu.engine.engine import Options

    given = ("chunk_tokens", "page_tokens", "cache_tokens", "max_batch")
    chosen = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    return Options(
        args.format, args.lm_head, args.exact, context, args.threads, kv_cache=args.kv_cache, speculate=args.speculate,
        wire=args.wire, read=args.read, **chosen,
    )  # fmt: skip


@dataclass(frozen=True)
class _Begun:
    """What rank 0 tells the others before anything is loaded: an exit code, if this is the end, and the context."""

    code: int | None = None
    context: int | None = None


class _Root:
    """Rank 0's part. A mistake is kept until all ranks know the exit code, and then raised here alone."""

    def __init__(self, args: argparse.Namespace, params: "SamplingParams", output: Output, stop: Stop) -> None:
        self._args, self._params, self._output, self._stop = args, params, output, stop
        self._problem: TpcpuError | None = None
        self._source: Source | None = None
        self._store: Store | None = None
        self._outcome: Outcome | None = None

    def open(self) -> _Begun:
        """Looks at input, model and what an earlier run has left."""
        try:
            return self._open()
        except TpcpuError as error:
            self._problem = error
            return _Begun(error.exit_code)

    def _open(self) -> _Begun:
        from tpcpu.batch import job
        from tpcpu.batch.source import Source
        from tpcpu.batch.store import Store
        from tpcpu.checkpoint import Checkpoint

        args = self._args
        given, named = Path(args.input).expanduser(), Path(args.output).expanduser()
        if not named.name:
            raise UsageError(f"--output {args.output}: is no file's name")
        if not named.parent.is_dir():
            raise UsageError(f"--output {args.output}: there is no folder {named.parent}; make it first")
        if named.exists() and given.exists() and named.samefile(given):
            raise UsageError(f"--output {args.output}: is the input; name another file")
        self._source = Source(given)
        with Checkpoint.open(args.model) as checkpoint:
            described = job.describe(checkpoint, self._source.digest, _options(args, args.context), self._params)
        self._store = store = Store(named, described, restart=args.restart, wait_seconds=args.fault_timeout)
        if store.finished:
            return _Begun(0)
        if store.answers or store.problems or store.begun:
            self._output.note(
                f"going on with {named}: {store.answers + store.problems} of {self._source.lines} lines are done, "
                f"{len(store.begun)} begun"
            )
        return _Begun(context=store.context or args.context)

    def run(self, scheduler: "Scheduler", tokenizer: "Tokenizer", context: int) -> int:
        """The work, while the others follow; the exit code of all ranks."""
        from tpcpu.batch.runner import Runner
        from tpcpu.cli.progress import AnswerProgress
        from tpcpu.engine.engine import DEFAULT_MAX_BATCH
        from tpcpu.errors import NoRoomError, OutputError

        assert self._source is not None
        assert self._store is not None
        try:
            with AnswerProgress(self._output) as progress:
                self._store.begin(context)
                self._outcome = Runner(
                    scheduler, tokenizer, self._source, self._store, self._params,
                    most=self._args.max_batch or DEFAULT_MAX_BATCH, stop=self._stop.asked, progress=progress,
                ).run()  # fmt: skip
        except (OutputError, NoRoomError) as error:
            self._problem = error
            return error.exit_code
        return self._stop.exit_code if self._outcome.stopped else 0

    def end(self, code: int, slow_ranks: Sequence[dict[str, Any]] = ()) -> int:
        """What is said at the end; the exit code. Raises what went wrong."""
        if self._problem is not None:
            raise self._problem
        store, output = self._store, self._output
        assert store is not None
        figures = asdict(self._outcome) if self._outcome is not None else {}
        told = f"{store.answers} answers in {store.output}"
        if store.problems:
            told += f", {store.problems} lines without one in {store.errors}"
        if self._outcome is None:
            told += "; all was done before"
        elif code:
            told += "; stopped before the end: run the same command again to go on"
        output.note(told)
        output.result(
            {"output": str(store.output), "finished": store.finished, "slow_ranks": slow_ranks, **figures}
            | {"answers": store.answers, "errors": store.problems}
        )
        return code

    def close(self) -> None:
        """Gives the files back."""
        if self._store is not None:
            self._store.close()
        if self._source is not None:
            self._source.close()
