"""What a command says and where: results on standard output, all else on standard error, by one rank of the job.

Knows the streams, the JSON contract (with --json the last line on standard output is one object and everything else
is on standard error) and which process of a launch speaks. It starts no MPI to find that out, and knows no model.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tpcpu.errors import NoRoomError


def is_speaker(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 of its launch, or was not launched as one of several."""
    from tpcpu.parallel.announcement import announced

    announcement = announced(environment)
    return announcement is None or announcement.rank == 0


def print_error(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    _print_line(f"tpcpu: error: {message}")


def silence_stdout() -> None:
    """For when the reader of standard output has gone: what is buffered goes nowhere, without a complaint at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def writing() -> Iterator[None]:
    """Inside, standard output is written to; NoRoomError where what it goes to cannot take any more."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise NoRoomError(f"standard output: {error.strerror}; the answer was not written to its end") from error


class Output:
    """The streams of one command. On ranks that do not speak, every method does nothing."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.speaks = is_speaker()

    @property
    def stream(self) -> TextIO:
        """Where text for a reader goes: standard output, unless that is kept for JSON."""
        return sys.stderr if self.as_json else sys.stdout

    def text(self, piece: str) -> None:
        """A piece of running text, shown at once: no line break is added."""
        if self.speaks:
            with writing():
                self.stream.write(piece)
                self.stream.flush()

    def line(self, text: str = "") -> None:
        """A whole line of the answer."""
        self.text(f"{text}\n")

    def note(self, text: str) -> None:
        """A line beside the answer: a hint, a phase, a warning; always on standard error."""
        if self.speaks:
            _print_line(f"tpcpu: {text}")

    def result(self, value: Mapping[str, Any]) -> None:
        """The JSON object of a command that was given --json; nothing otherwise. Call it last."""
        if self.speaks and self.as_json:
            sys.stderr.flush()
            with writing():
                # ASCII only: any terminal takes it, and half a surrogate pair cannot break the line.
                print(json.dumps(value, allow_nan=False), flush=True)


def _print_line(text: str) -> None:
    """Control characters (a file's name may hold any) are shown, not obeyed."""
    visible = "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)
    with suppress(OSError):
        print(visible.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
