"""`tpcpu supervise`: a command that is started again when a fault ended it.

Knows flags and the log. The work is in `parallel/supervision.py`.
"""

import argparse
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from tpcpu.cli.flags import positive, seconds
from tpcpu.cli.output import Output
from tpcpu.errors import OutputError, UsageError


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "supervise",
        help="start a command again when a fault ends it",
        description="Run COMMAND, and run it again when it fails, such as when a rank or a host is lost. Exit codes 0, "
        "2 (a mistake), 75 (stopped when asked, to be run again later) and 130 (Ctrl-C) end it, and so does a signal "
        "to this command, which is passed on. The exit code is COMMAND's last.",
    )
    parser.add_argument("--restarts", type=_count, default=10, metavar="N", help="at most (default: 10)")
    parser.add_argument("--log", metavar="FILE", help="append what happens to FILE, too")
    parser.add_argument("--hostfile", metavar="FILE", help="start COMMAND with mpiexec on these hosts, if they answer")
    parser.add_argument("--ranks", type=positive, metavar="N", help="with --hostfile: at most (default: all it holds)")
    parser.add_argument(
        "--fault-timeout", type=seconds, default=10.0, metavar="SECONDS",
        help="after which a stopped process ends the run (default: 10)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from tpcpu.parallel.hostfile import read_hostfile
    from tpcpu.parallel.launcher import in_launcher
    from tpcpu.parallel.supervision import Policy, Supervisor

    command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not command:
        raise UsageError("no command to supervise; it comes last, as in tpcpu supervise -- tpcpu batch ...")
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]}: found no such command")
    if args.ranks is not None and args.hostfile is None:
        raise UsageError("--ranks belongs to --hostfile; without it COMMAND starts its own ranks")
    if in_launcher():
        raise UsageError("supervise starts mpiexec, and is not to be started by it")
    hosts = tuple(read_hostfile(Path(args.hostfile))) if args.hostfile is not None else ()
    output = Output(args.json)
    with ExitStack() as open_files:
        file = None
        if args.log is not None:
            try:
                file = open_files.enter_context(open(args.log, "a", encoding="utf-8"))
            except OSError as error:
                raise OutputError(f"--log {args.log}: {error.strerror}") from error

        def log(line: str) -> None:
            output.note(f"supervise: {line}")
            if file is not None:
                file.write(f"{datetime.now().astimezone().isoformat(timespec='milliseconds')} {line}\n")
                file.flush()
                os.fsync(file.fileno())

        outcome = Supervisor(
            command, Policy(args.restarts, args.fault_timeout, ranks=args.ranks, hosts=hosts), log
        ).run()
    output.result({
        "exit_code": outcome.code, "restarts": outcome.restarts, "seconds_lost": round(outcome.seconds_lost, 3),
        "runs": [asdict(each) for each in outcome.runs],
    })  # fmt: skip
    return outcome.code


def _count(text: str) -> int:
    """A whole number, 0 included."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number")
    return int(text)
