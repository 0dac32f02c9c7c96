"""The two programs of `against_llama_cpp.py`, one visit at a time: llama.cpp, and `tpcpu bench`.

Knows command lines and what is printed; knows nothing of rounds and ratios.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.llama_cpp_peer import HUGE_PAGES, Work, llama_bench_commands, parse_llama_bench
from tpcpu.errors import TpcpuError, UsageError

ROOT = Path(__file__).parents[2]

INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" {python} -m pip install gguf llama-cpp-python --no-binary llama-cpp-python'


def parse_bench(text: str) -> dict[str, Any]:
    """The JSON of `tpcpu bench`, its last line."""
    lines = text.splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        found = None
    needed = ("decode_tokens_per_s", "prefill_tokens_per_s", "read_bandwidth_gbs", "bandwidth_fraction")
    needed += ("weight_bytes_per_token",)
    lacking = [key for key in needed if not isinstance(found, dict) or key not in found]
    if lacking:
        raise TpcpuError(f"tpcpu bench printed {(lines or [''])[-1][:80]!r}, expected JSON with {', '.join(lacking)}")
    return dict(found)


def call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a command; its last words become the error where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
        )
    except OSError as error:
        raise UsageError(f"{command[0]}: {error.strerror}; expected a program") from None
    if done.returncode:
        last = ([line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()] or [""])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise TpcpuError(f"{Path(command[0]).name} {' '.join(command[1:3])[:100]}: {how}: {last[:300]}")
    return done.stdout


FIND = "import sys, importlib.util as u; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
"""Prints which of its arguments are packages that an interpreter lacks."""


class Peer:
    """llama.cpp, through llama-bench or llama-cpp-python. The interpreter `python` holds gguf and the latter."""

    def __init__(self, python: str, llama_bench: str | None) -> None:
        self._python = python
        self._program = llama_bench
        self._usage = ""
        self.version = ""
        self.huge_pages_gb: float | None = None
        needed = ["numpy", "gguf"] if llama_bench else ["numpy", "gguf", "llama_cpp"]
        if lacking := call([python, "-c", FIND, *needed]).split():
            raise UsageError(
                f"{python} has no {' and no '.join(lacking)}; install with\n  {INSTALL.format(python=python)}\n"
                "or name an interpreter that has them with --peer-python; in place of llama_cpp, LLAMA_BENCH may name "
                "llama.cpp's own program, /path/to/llama-bench"
            )
        if llama_bench:
            self._usage = call([llama_bench, "--help"])

    def _job(self, **job: Any) -> Any:
        program = str(Path(__file__).with_name("llama_cpp_peer.py"))
        return json.loads(call([self._python, program, json.dumps(job)], HUGE_PAGES).splitlines()[-1])

    def write(self, path: Path, shape: Mapping[str, Any], format_name: str) -> None:
        """The file of one format."""
        self._job(job="write", path=str(path), shape=shape, format_name=format_name)

    def visit(self, path: Path, repack: bool, work: Work) -> dict[str, float] | None:
        """Tokens per second of decode and prefill, medians of its runs; None where this llama-bench cannot."""
        if self._program is None:
            found = self._job(job="measure", path=str(path), repack=repack, work=work)
            self.version, self.huge_pages_gb = found["version"], found["huge_pages_gb"]
            return {what: statistics.median(found[what]) for what in ("decode", "prefill")}
        commands = llama_bench_commands(self._program, self._usage, str(path), repack, work)
        if commands is None:
            return None
        speeds = {}
        for what, command in commands.items():
            try:
                values, self.version = parse_llama_bench(call(command, HUGE_PAGES))
            except ValueError as error:
                raise TpcpuError(str(error)) from None
            speeds[what] = statistics.median(values)
        return speeds


def bench(config: Path, ranks: int, threads: int, runs: int, prompt: int, new: int) -> dict[str, Any]:
    """One `tpcpu bench` with NF4 weights."""
    command = [
        sys.executable, "-m", "tpcpu", "bench", "--config", str(config), "--fake-weights", "--format", "nf4",
        "--ranks", str(ranks), "--threads", str(threads), "--runs", str(runs),
        "--prompt-tokens", str(prompt), "--new-tokens", str(new), "--json",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return parse_bench(call(command, {"PYTHONPATH": path}))
