"""The command line: `tpcpu COMMAND`, one file per command in this folder.

A command is a module with `add_parser(subparsers)` and `run(args) -> int` (the exit code). This file chooses the
module, and turns what went wrong into one line and an exit code: 0; 1 a failure; 2 a user's mistake; 75 stopped by a
signal, to be run again (batch); 130 Ctrl-C.
It knows no model and no rank. Only the named command's module is imported, and a command imports what is heavy
(kernels, MPI) inside `run`: help and usage errors come at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from tpcpu.cli.output import is_speaker, print_error, silence_stdout, writing
from tpcpu.errors import TpcpuError, UsageError, UserError

COMMANDS = ("quantize", "inspect", "explain", "generate", "chat", "batch", "eval", "bench", "supervise")

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, None for the process's own. Returns the exit code."""
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if code and (departure := sys.modules.get("tpcpu.parallel.departure")) is not None:
        # Ranks that go on without this one would wait for ever.
        departure.fail()
    return code


def _run(arguments: list[str]) -> int:
    try:
        code = _dispatch(arguments)
        with writing():
            sys.stdout.flush()
        return code
    except TpcpuError as error:
        # A mistake of the user is met by every rank alike, and said once; a failure is said by whoever met it.
        if is_speaker() or not isinstance(error, UserError):
            print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        silence_stdout()  # whoever read the answer has had enough: nobody is left to tell
        return 1
    except MemoryError as error:
        print_error(
            f"out of memory{f': {error}' if str(error) else ''}; "
            "a smaller --context, a smaller --format or more --ranks on other hosts need less here"
        )
        return 1


def _dispatch(arguments: list[str]) -> int:
    named = arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS
    modules = {name: import_module(f"tpcpu.cli.{name}") for name in named}
    parser = make_parser(modules)
    try:
        args = parser.parse_args(arguments, argparse.Namespace(arguments=arguments))
    except SystemExit as done:  # after --help and --version, which have printed
        return int(done.code or 0)
    return int(modules[args.command].run(args))


def make_parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """The parser of `tpcpu` with the given commands, by name."""
    parser = Parser(
        prog="tpcpu",
        description="Large language models on CPU servers: one MPI rank per socket, NF4 weights, numba kernels.",
        epilog="tpcpu COMMAND --help tells a command's flags. Environment: TPCPU_ISA (avx512_vnni, avx512, avx2 or "
        "generic) forces an instruction set; TPCPU_CACHE_DIR holds the compiled kernels.",
    )
    parser.add_argument("--version", action=_Version, help="version, MPI library, instruction set, cores, NUMA nodes")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for module in modules.values():
        module.add_parser(subparsers)
    return parser


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print a usage block and exit. Flags are never abbreviated."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Reports a wrong command line."""
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Prints the line of `--version` and ends; what it has to ask is asked only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: object) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)  # type: ignore[arg-type]

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from tpcpu.cli.version import version_line

        if is_speaker():
            print(version_line())
        parser.exit()
