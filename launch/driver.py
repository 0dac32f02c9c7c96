#!/usr/bin/env python3
"""A driver for tpcpu: copy it, and put your own work in `main`.

    python driver.py /models/yuan2-102b-nf4                starts the ranks itself: one per socket, or --ranks N
    mpirun -n 4 python driver.py /models/yuan2-102b-nf4    every rank runs this file, and gets the same answers
    srun --mpi=pmi2 -n 4 python driver.py /models/...      the same, in a SLURM job

However it ends, by itself, by an exception or by Ctrl-C, the ranks end with it.
"""

import argparse

from tpcpu import LLM, SamplingParams
from tpcpu.errors import PromptError


def main() -> None:
    """Loads a model, streams an answer, answers many prompts together, and goes on after a bad one."""
    parser = argparse.ArgumentParser(description="Ask a model a few things.")
    parser.add_argument("model", help="a folder, or a hub name in the local Hugging Face cache")
    parser.add_argument("--ranks", type=int, help="default: one per socket; under a launcher, the launcher's")
    args = parser.parse_args()

    # Under a launcher all ranks make the same calls in the same order. So what differs between ranks or between runs
    # (files, time, random numbers) must not decide what is asked. Only the writing belongs to one of them.
    with LLM(args.model, ranks=args.ranks) as llm:

        def say(text: str, end: str = "\n") -> None:
            if llm.is_root:
                print(text, end=end, flush=True)

        # One answer, as it is written.
        for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=48, temperature=0)):
            say(chunk.text, end="")
        say("")

        # Many together, each with its own parameters if need be; answers come in the order of the prompts.
        prompts = ["The big dog", "One day, a girl named Lily", "Tom had a red ball"]
        params = [SamplingParams(max_tokens=24, temperature=0.8, seed=number) for number in range(len(prompts))]
        for prompt, answer in zip(prompts, llm.generate(prompts, params), strict=True):
            say(f"{prompt!r} -> {answer.text!r} ({answer.finish_reason})")

        # A request that cannot be answered raises on all ranks alike, and the model answers the next one.
        try:
            llm.generate("")
        except PromptError as problem:
            say(f"refused: {problem}")
        (answer,) = llm.generate("The end", SamplingParams(max_tokens=8, temperature=0))
        say(f"{answer.text!r}, {len(answer.ids)} tokens, {answer.decode_tokens_per_s:.0f} tokens/s")


if __name__ == "__main__":
    main()
