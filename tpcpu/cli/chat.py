"""`tpcpu chat`: a conversation in the terminal. Ctrl-C ends the answer, not the program.

Knows the terminal and the messages so far; the model, and what its cache keeps between turns, is `tpcpu.LLM`.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tpcpu.cli.flags import model_flags, sampling_flags, sampling_params
from tpcpu.cli.output import Output
from tpcpu.errors import LaunchError, PromptError

if TYPE_CHECKING:
    from tpcpu.llm import LLM
    from tpcpu.sampling import SamplingParams

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends; Ctrl-C ends an answer"


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat", help="talk with a model in the terminal", description=f"A conversation with the model DIR. {_HELP}."
    )
    parser.add_argument("--system", metavar="TEXT", help="what comes before the conversation")
    model_flags(parser)
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
        output.note(_HELP)
        while (line := _read()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/clear":
                    messages = list(opening)
                    continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(llm, messages, params, output)
            except PromptError as error:
                # The conversation has outgrown the context, or holds what cannot be said: it goes on without.
                output.note(f"{error}; /clear begins anew")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
    output.result({"messages": messages})
    return 0


def _read() -> str | None:
    """A line of the user; None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()


def _answer(llm: "LLM", messages: list[dict[str, str]], params: "SamplingParams", output: Output) -> str:
    """Streams an answer; what was said of one that Ctrl-C ended."""
    said: list[str] = []
    chunks = llm.stream(messages, params)
    try:
        for chunk in chunks:
            said.append(chunk.text)
            output.text(chunk.text)
    except KeyboardInterrupt:
        # Closing it tells the ranks.
        chunks.close()
        output.note("answer ended")
    output.text("\n")
    return "".join(said)
