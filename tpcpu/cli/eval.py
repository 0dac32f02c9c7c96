"""`tpcpu eval`: the loss of a model on a text, in nats per token.

Knows how a file is cut into documents and how their losses are summed up; the losses come from `tpcpu.LLM`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from tpcpu.cli.flags import model_flags, positive
from tpcpu.cli.output import Output
from tpcpu.errors import PromptError, UsageError


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="the loss of a model on a text",
        description="The loss of the model DIR on a text, in nats per token. Each document is scored by itself, "
        "truncated at the window; its first token is not scored.",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--separator", default="<eod>", metavar="TEXT", help="between documents (default: %(default)s)")
    parser.add_argument("--window", type=positive, default=256, metavar="N", help="tokens (default: %(default)s)")
    model_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from tpcpu.cli.loading import load

    output = Output(args.json)
    documents = read_documents(Path(args.text), args.separator)
    with load(args, output) as llm:
        scores = []
        for i, document in enumerate(documents, start=1):
            scores += llm.score([document], args.window)
            if i % 10 == 0:
                output.note(f"{i} of {len(documents)} documents")
    losses = [score.nll for score in scores]
    tokens = [score.tokens for score in scores]
    if not sum(tokens):
        raise PromptError(f"{args.text}: no document has two tokens, so there is nothing to predict")
    mean, error = mean_and_error(losses, tokens)
    output.line(f"{mean:.6f} nats per token over {sum(tokens)} tokens of {len(documents)} documents, +- {error:.6f}")
    output.result(
        {
            "nll_per_token": mean,
            "tokens": sum(tokens),
            "standard_error": error,
            "documents": [{"nll": nll, "tokens": count} for nll, count in zip(losses, tokens, strict=True)],
        }
    )
    return 0


def read_documents(path: Path, separator: str) -> list[str]:
    """The documents of a file, without white space around them and without empty ones. Raises UsageError."""
    if not separator:
        raise UsageError("--separator is empty; expected the text between documents")
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"--text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"--text {path}: not UTF-8 at byte {error.start}; convert it first") from error
    documents = [document for part in text.split(separator) if (document := part.strip())]
    if not documents:
        raise PromptError(f"--text {path}: holds no text")
    return documents


def mean_and_error(losses: list[float], tokens: list[int]) -> tuple[float, float]:
    """Loss per token, and its standard error over documents (of a ratio of sums: documents differ in length)."""
    mean = sum(losses) / sum(tokens)
    count = len(losses)
    if count < 2:
        return mean, 0.0
    residuals = [loss - mean * number for loss, number in zip(losses, tokens, strict=True)]
    spread = sum(residual**2 for residual in residuals) / (count - 1)
    return mean, math.sqrt(spread * count) / sum(tokens)
