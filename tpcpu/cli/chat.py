"""`tpcpu chat`: a conversation in the terminal. Ctrl-C ends the answer, not the program.

Knows the terminal and the messages so far; the model, and what its cache keeps between turns, is `tpcpu.LLM`.
"""

import argparse
import io
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tpcpu.cli.flags import model_flags, sampling_flags, sampling_params, speculation_flag
from tpcpu.cli.output import Output
from tpcpu.errors import LaunchError, PromptError, TextError

if TYPE_CHECKING:
    from tpcpu.llm import LLM
    from tpcpu.sampling import SamplingParams

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C ends an answer"
_PROMPT = "> "

_COMMAND = re.compile(r"/[a-z]+")
"""What was meant as one; a path has more to it."""


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat", help="talk with a model in the terminal", description=f"A conversation with the model DIR. {_HELP}."
    )
    parser.add_argument("--system", metavar="TEXT", help="what comes before the conversation")
    model_flags(parser)
    speculation_flag(parser)
    sampling_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from tpcpu.cli.loading import load
    from tpcpu.parallel.launcher import in_launcher
    from tpcpu.text import check_text

    if in_launcher():
        raise LaunchError("chat needs this terminal for itself: start it without mpiexec, with --ranks N")
    output = Output(args.json)
    params = sampling_params(args)
    opening = [{"role": "system", "content": check_text(args.system)}] if args.system is not None else []
    messages = list(opening)
    with load(args, output) as llm:
        if not llm.info.has_chat_template:
            raise TextError(f"{args.model}: has no chat template, so it cannot hold a conversation; try tpcpu generate")
        terminal = _Terminal()
        output.note(_HELP)
        while (line := terminal.read()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/clear":
                    messages = list(opening)
                    output.note("forgotten")
                    continue
                case command if _COMMAND.fullmatch(command):
                    output.note(f"{command} is no command; {_HELP}")
                    continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(llm, messages, params, output)
            except PromptError as error:
                # The conversation has outgrown the context, or the line is no text: it goes on without.
                output.note(f"not sent: {error}{'' if len(messages) == 1 else '; /clear begins anew'}")
                answer = ""
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()
    output.result({"messages": messages})
    return 0


class _Terminal:
    """Where the user's lines come from: a terminal, with a prompt and line editing, or a pipe."""

    def __init__(self) -> None:
        self._typed = sys.stdin.isatty()
        if self._typed:
            with suppress(ImportError):
                import readline  # noqa: F401  input() edits lines with it
        if isinstance(sys.stdin, io.TextIOWrapper):
            # What is not UTF-8 is to be refused where it is used, with the conversation going on.
            sys.stdin.reconfigure(errors="surrogateescape")

    def read(self) -> str | None:
        """A line of the user; None at the end of input."""
        while True:
            try:
                return self._line()
            except EOFError:
                self._say("\n")
                return None
            except KeyboardInterrupt:
                if not self._typed:
                    raise
                self._say("\n(Ctrl-D or /exit ends)\n")

    def _line(self) -> str:
        if self._typed and sys.stdout.isatty():
            return input(_PROMPT)
        # input() would write the prompt into the file that standard output is.
        self._say(_PROMPT)
        return input()

    def _say(self, text: str) -> None:
        if self._typed:
            sys.stderr.write(text)
            sys.stderr.flush()


def _answer(llm: "LLM", messages: list[dict[str, str]], params: "SamplingParams", output: Output) -> str:
    """Streams an answer; what was said of one that Ctrl-C ended."""
    said: list[str] = []
    completion = None
    chunks = llm.stream(messages, params)
    try:
        for chunk in chunks:
            said.append(chunk.text)
            output.text(chunk.text)
            completion = chunk.completion
        output.text("\n")
    except KeyboardInterrupt:
        # Closing it tells the ranks.
        chunks.close()
        output.text("\n")
        output.note("answer ended")
    if completion is not None and completion.finish_reason == "length":
        if len(completion.ids) < params.max_tokens:
            output.note(
                f"the answer was cut where the context of {llm.info.context} tokens is full; /clear begins anew"
            )
        else:
            output.note(f"the answer was cut after {params.max_tokens} tokens; --max-tokens allows more")
    return "".join(said)
