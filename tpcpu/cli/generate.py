"""`tpcpu generate`: one answer to one prompt, streamed.

Knows flags and streams. The model is `tpcpu.LLM`.
"""

import argparse
import dataclasses
from typing import Any

from tpcpu.cli.flags import model_flags, positive, sampling_flags, sampling_params, speculation_flag
from tpcpu.cli.output import Output
from tpcpu.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate", help="answer a prompt", description="Answer one prompt with the model DIR, token by token."
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="raw text, to be continued; special strings count")
    given.add_argument("--message", metavar="TEXT", help="a message in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --message: what comes before it")
    model_flags(parser)
    speculation_flag(parser)
    sampling_flags(parser)
    shown = parser.add_argument_group("shown with --json")
    shown.add_argument("--logprobs", type=int, metavar="N", help="log probabilities of each token and the N likeliest")
    shown.add_argument("--top-logits", type=positive, metavar="N", help="the N largest logits before each token")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.system is not None and args.message is None:
        raise UsageError("--system belongs to --message; with --prompt write it into the text")
    from tpcpu.cli.loading import load
    from tpcpu.text import check_text

    output = Output(args.json)
    params = sampling_params(args)
    prompt: Any
    if args.prompt is not None:
        prompt = check_text(args.prompt)
    else:
        messages = [("system", args.system)] if args.system is not None else []
        messages.append(("user", args.message))
        prompt = [{"role": role, "content": check_text(text)} for role, text in messages]
    with load(args, output) as llm:
        if args.prompt is not None and llm.info.has_chat_template:
            output.note("hint: this model has a chat template; --message asks it a question")
        completion = None
        for chunk in llm.stream(prompt, params):
            output.text(chunk.text)
            completion = chunk.completion
        assert completion is not None
        output.text("\n")
        result = {
            "prompt_ids": completion.prompt_ids,
            "ids": completion.ids,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "seed": completion.seed,
            "ttft_ms": completion.ttft_ms,
            "decode_tokens_per_s": completion.decode_tokens_per_s,
            "ranks": llm.info.ranks,
        }
        if llm.info.ranks > 1:
            result["slow_ranks"] = [dataclasses.asdict(each) for each in llm.slow_ranks]
        for name in ("logprobs", "top_logits"):
            if (value := getattr(completion, name)) is not None:
                result[name] = value
        output.result(result)
    return 0
