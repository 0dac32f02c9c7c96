"""llama.cpp's side of `against_llama_cpp.py`: how fast it reads a prompt and decodes, in its best settings.

Knows llama.cpp's low-level interface through llama-cpp-python, and llama.cpp's own program `llama-bench`. Knows nothing
of tpcpu: as a program it does one job, under whichever interpreter has the packages, and its last line is JSON.

    python tests/bench/llama_cpp_peer.py '{"job": "write", "path": ..., "shape": ..., "format_name": ...}'
    python tests/bench/llama_cpp_peer.py '{"job": "measure", "path": ..., "repack": true, "work": [2, 16, 128, 512, 1]}'
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from tests.bench.gguf_model import write

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment in which glibc (2.35 or newer) puts llama.cpp's weights into huge pages; it asks for none itself."""

SETTINGS = "flash attention, huge pages, weights in memory of its own (no mmap), one batch for the whole prompt"


class Work(NamedTuple):
    """What one visit measures, each `runs` times: `new` tokens after `prompt`, and a prompt of `prefill` tokens."""

    threads: int
    prompt: int
    new: int
    prefill: int
    runs: int


def choose(structure: Any, *choices: tuple[str, Any]) -> None:
    """Sets the first field that this version's settings have. One that they lack would be set to no effect."""
    fields = {field[0] for field in structure._fields_}
    for name, value in choices:
        if name in fields:
            setattr(structure, name, value)
            return
    raise SystemExit(
        f"this llama-cpp-python has no setting {' or '.join(name for name, _ in choices)}; take a newer one"
    )


@contextlib.contextmanager
def loaded(path: str, work: Work, repack: bool) -> Iterator[tuple[Any, Any]]:
    """The module llama_cpp, and a context on the file."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(*_: Any) -> None:
        """Says nothing of what is loaded."""

    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    for_model = llama_cpp.llama_model_default_params()
    choose(for_model, ("load_mode", 0), ("use_mmap", False))
    choose(for_model, ("use_extra_bufts", repack))
    model = llama_cpp.llama_model_load_from_file(path.encode(), for_model)
    if not model:
        raise SystemExit(f"{path}: llama-cpp-python {llama_cpp.__version__} does not load it")
    for_context = llama_cpp.llama_context_default_params()
    for_context.n_ctx = max(work.prompt + work.new, work.prefill)
    for_context.n_batch = for_context.n_ubatch = max(work.prompt, work.prefill)
    for_context.n_threads = for_context.n_threads_batch = work.threads
    choose(for_context, ("flash_attn_type", 1), ("flash_attn", True))
    context = llama_cpp.llama_init_from_model(model, for_context)
    if not context:
        raise SystemExit(f"{path}: llama.cpp makes no context of {for_context.n_ctx} tokens")
    yield llama_cpp, context
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def huge_page_gb(rollup: str) -> float:
    """GB of anonymous huge pages, from the text of smaps_rollup."""
    found = re.search(r"^AnonHugePages:\s+(\d+) kB$", rollup, re.MULTILINE)
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def measure(path: str, repack: bool, work: Sequence[int]) -> dict[str, Any]:
    """Tokens per second of decode and of prefill, one value a run.

    A prompt and some tokens go before and are not counted. Only llama_decode is timed: nothing is sampled, no text.
    """
    task = Work(*work)
    random = np.random.default_rng(0)
    with loaded(path, task, repack) as (api, context):
        vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
        memory = api.llama_get_memory(context)

        def feed(count: int) -> None:
            tokens = (api.llama_token * count)(*random.integers(vocab, size=count).tolist())
            code = api.llama_decode(context, api.llama_batch_get_one(tokens, count))
            api.llama_synchronize(context)
            if code:
                raise SystemExit(f"{path}: llama_decode of {count} tokens returns {code}")

        def seconds(before: int, pieces: Sequence[int]) -> float:
            api.llama_memory_clear(memory, True)
            if before:
                feed(before)
            start = time.perf_counter()
            for piece in pieces:
                feed(piece)
            return time.perf_counter() - start

        seconds(0, [task.prefill])
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (vocab,))
        if not np.isfinite(logits).all() or np.ptp(logits) == 0:
            raise SystemExit(f"{path}: llama.cpp's logits are not finite, or all the same")
        seconds(task.prompt, [1] * min(task.new, 8))
        return {
            "decode": [task.new / seconds(task.prompt, [1] * task.new) for _ in range(task.runs)],
            "prefill": [task.prefill / seconds(0, [task.prefill]) for _ in range(task.runs)],
            "version": f"llama-cpp-python {api.__version__}; {api.llama_print_system_info().decode().strip(' |')}",
            "huge_pages_gb": huge_page_gb(Path("/proc/self/smaps_rollup").read_text()),
        }


def llama_bench_commands(program: str, usage: str, path: str, repack: bool, work: Work) -> dict[str, list[str]] | None:
    """Decode and prefill by llama-bench, whose `usage` tells what its version calls things.

    None where it cannot do without repacking. llama-bench warms up by itself.
    """
    command = [program, "-m", path, "-t", str(work.threads), "-r", str(work.runs), "-o", "json", "-fa", "1"]
    command += ["-b", str(work.prefill), "-ub", str(work.prefill)]
    command += ["-lm", "none"] if "--load-mode" in usage else ["-mmp", "0"]
    if not repack:
        if "--repack" not in usage:
            return None
        command += ["--repack", "0"]
    return {
        "decode": [*command, "-p", "0", "-n", str(work.new), "-d", str(work.prompt)],
        "prefill": [*command, "-p", str(work.prefill), "-n", "0"],
    }


def parse_llama_bench(text: str) -> tuple[list[float], str]:
    """Tokens per second of every run of llama-bench's one test, and which llama-bench it was."""
    try:
        (test,) = json.loads(text)
        return [float(value) for value in test["samples_ts"]], f"llama-bench {test['build_commit']}"
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"llama-bench printed {text[:80]!r}, expected the JSON of one test with samples_ts") from None


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"write": write, "measure": measure}[job.pop("job")](**job)))
