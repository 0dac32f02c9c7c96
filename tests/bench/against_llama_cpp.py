"""tpcpu beside llama.cpp: the same shape with random weights, by turns in one run, on the same pinned cores.

llama.cpp runs through the `llama-bench` that LLAMA_BENCH names, or else through llama-cpp-python, on files of Q4_0,
IQ4_NL and Q4_K_M with and without repacking; its best figure counts, for decode and for the prompt apart. tpcpu runs
as `tpcpu bench` with NF4. Nothing else must run meanwhile. Exits with 1 where llama.cpp stays under 0.45 of the read
bandwidth: it is misbuilt then, or was disturbed, and the comparison is void.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install gguf llama-cpp-python --no-binary llama-cpp-python
    python tests/bench/against_llama_cpp.py --config config.json [--rounds 3] [--json]
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.gguf_model import FORMATS, bytes_per_token
from tests.bench.llama_cpp_peer import SETTINGS, Work
from tests.bench.visits import INSTALL, Peer, bench
from tpcpu.errors import ConfigError, TpcpuError, UsageError
from tpcpu.models import read_config
from tpcpu.models.llama import LlamaConfig
from tpcpu.parallel.topology import Topology

LEAST_FRACTION = 0.45
"""Of the read bandwidth: what a native build of llama.cpp reaches with room to spare."""


class Spread(NamedTuple):
    """A median and the lowest and highest of the values that it stands for."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


class Visit(NamedTuple):
    """tpcpu once and, right after it, llama.cpp on one format: tokens per second by what was measured."""

    format: str
    ours: dict[str, float]
    fraction: float
    """What `tpcpu bench` calls bandwidth_fraction."""
    bandwidth: float
    """GB/s that the cores read at that time."""
    theirs: dict[str, dict[str, float]]
    """By setting."""


REPACKED = {True: "repacked", False: "as stored"}


def pairs(visits: Sequence[Visit], what: str) -> dict[str, list[float]]:
    """tpcpu ÷ llama.cpp in each visit, for each of llama.cpp's settings: neighbours in time see the same machine."""
    found: dict[str, list[float]] = {}
    for visit in visits:
        for setting, speeds in visit.theirs.items():
            found.setdefault(setting, []).append(visit.ours[what] / speeds[what])
    return found


def fractions(visits: Sequence[Visit], weight_bytes: Mapping[str, int]) -> dict[str, float]:
    """Of the read bandwidth of the visit, the median for each of llama.cpp's settings."""
    found: dict[str, list[float]] = {}
    for visit in visits:
        for setting, speeds in visit.theirs.items():
            rate = weight_bytes[visit.format] * speeds["decode"] / 1e9
            found.setdefault(setting, []).append(rate / visit.bandwidth)
    return {setting: statistics.median(values) for setting, values in found.items()}


def verdict(visits: Sequence[Visit], weight_bytes: Mapping[str, int]) -> dict[str, Any]:
    """The ratios, against the setting of llama.cpp that stands best beside tpcpu, and whether they mean anything."""
    result: dict[str, Any] = {"read_bandwidth_gbs": statistics.median(visit.bandwidth for visit in visits)}
    for what in ("decode", "prefill"):
        ratios = pairs(visits, what)
        best = min(ratios, key=lambda setting: statistics.median(ratios[setting]))
        result[f"{what}_ratio"] = statistics.median(ratios[best])
        result[f"{what}_ratios"] = ratios[best]
        result[f"peer_{what}_best"] = best
    result["bandwidth_fraction"] = statistics.median(visit.fraction for visit in visits)
    result["peer_bandwidth_fraction"] = fractions(visits, weight_bytes)[result["peer_decode_best"]]
    result["void"] = result["peer_bandwidth_fraction"] < LEAST_FRACTION
    return result


def report(visits: Sequence[Visit], weight_bytes: Mapping[str, int], own_bytes: int) -> list[str]:
    """The table and the ratios, for people."""
    found = verdict(visits, weight_bytes)
    shares = fractions(visits, weight_bytes)
    rows = [("tpcpu NF4", own_bytes, found["bandwidth_fraction"], [visit.ours for visit in visits])]
    for setting in shares:
        held = [visit for visit in visits if setting in visit.theirs]
        rows.append((setting, weight_bytes[held[0].format], shares[setting], [each.theirs[setting] for each in held]))
    lines = [
        f"read bandwidth {Spread.of([visit.bandwidth for visit in visits]):.1f} GB/s",
        "| | MB per token | decode, tokens/s | of read bandwidth | prompt, tokens/s |",
        "|---|---|---|---|---|",
    ]
    for title, size, share, speeds in rows:
        decode, prefill = (Spread.of([each[what] for each in speeds]) for what in ("decode", "prefill"))
        lines.append(f"| {title} | {size / 1e6:.0f} | {decode:.1f} | {share:.2f} | {prefill:.0f} |")
    for what in ("decode", "prefill"):
        spread = Spread.of(found[f"{what}_ratios"])
        lines.append(f"{what}: tpcpu is {spread:.2f} × llama.cpp's best, {found[f'peer_{what}_best']}")
    lines.append(f"llama.cpp's decode takes {found['peer_bandwidth_fraction']:.2f} of the read bandwidth")
    return lines


def compare(args: argparse.Namespace, peer: Peer, shape: Mapping[str, Any], folder: Path, say: "Say") -> dict[str, Any]:
    """All rounds, one process at a time; what was found, for JSON."""
    work = Work(args.ranks * args.threads, prompt=16, new=128, prefill=512, runs=args.runs)
    run = functools.partial(bench, args.config, args.ranks, args.threads, args.runs)
    files = {name: folder / f"{name}.gguf" for name in args.formats}
    for name, file in files.items():
        peer.write(file, shape, name)
        say.progress(f"wrote {file}, {file.stat().st_size / 1e6:.0f} MB")
    visits = []
    for number, name in itertools.product(range(1, args.rounds + 1), args.formats):
        decode, prompt = run(work.prompt, work.new), run(work.prefill, 1)
        visit = Visit(
            name,
            {"decode": decode["decode_tokens_per_s"], "prefill": prompt["prefill_tokens_per_s"]},
            decode["bandwidth_fraction"],
            max(each["read_bandwidth_gbs"] for each in (decode, prompt)),
            {},
        )
        for repack, how in REPACKED.items():
            if speeds := peer.visit(files[name], repack, work):
                visit.theirs[f"{name} {how}"] = speeds
        visits.append(visit)
        for title, speeds in {"tpcpu": visit.ours, **visit.theirs}.items():
            say.progress(
                f"round {number}: {title}: decode {speeds['decode']:.1f}, prompt {speeds['prefill']:.0f} tokens/s"
            )
    weight_bytes = {name: bytes_per_token(shape, name) for name in args.formats}
    say(
        f"{args.config}, cores {args.cpus}, tpcpu {args.ranks} × {args.threads} threads, llama.cpp {work.threads}; "
        f"{work.new} new tokens after {work.prompt}, a prompt of {work.prefill}; medians (lowest to highest)"
    )
    in_huge_pages = "" if peer.huge_pages_gb is None else f" ({peer.huge_pages_gb:.2f} GB in huge pages)"
    say(f"llama.cpp: {peer.version}; {SETTINGS}{in_huge_pages}")
    for line in report(visits, weight_bytes, decode["weight_bytes_per_token"]):
        say(line)
    return verdict(visits, weight_bytes) | {
        "config": str(args.config), "cpus": args.cpus, "ranks": args.ranks, "threads_per_rank": args.threads,
        **{key: value for key, value in work._asdict().items() if key != "threads"},
        "weight_bytes_per_token": decode["weight_bytes_per_token"], "peer_weight_bytes_per_token": weight_bytes,
        "peer_version": peer.version, "peer_settings": SETTINGS, "peer_huge_pages_gb": peer.huge_pages_gb,
        "visits": [visit._asdict() for visit in visits],
    }  # fmt: skip


class Say:
    """Prints for people: to standard error where standard output is for JSON, and progress always there."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def __call__(self, text: str) -> None:
        print(text, file=sys.stderr if self._as_json else sys.stdout, flush=True)

    def progress(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def read_shape(path: Path, formats: Sequence[str]) -> dict[str, Any]:
    """The sizes of a Llama that llama.cpp runs too, in these formats."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; expected the config.json of a Llama model") from None
    model = read_config(config)
    # Others in Llama's frame have windows or norms besides.
    if model.model_type != "llama" or not isinstance(model.config, LlamaConfig):
        raise ConfigError(
            f"{path}: model_type is {model.model_type}, of which no GGUF file is made here; expected llama"
        )
    rope = model.config.rope
    if rope.scaling is not None:
        raise ConfigError(f"{path}: its rotary embedding is scaled; the GGUF files made here have the default one")
    shape = dataclasses.asdict(model.config) | {"rope_theta": rope.theta}
    for key, biased in (("attention_bias", model.config.qkv_bias), ("mlp_bias", model.config.mlp_bias)):
        if biased:
            raise ConfigError(f"{path}: {key} is true; no GGUF file with biases is made here, set it to false")
    try:
        for name in formats:
            bytes_per_token(shape, name)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; leave it out of --formats") from None
    return shape


def pin(ranks: int, threads: int, asked: Sequence[int] | None) -> list[int]:
    """Confines this process and all that it starts to a core for each thread; returns the cores."""
    cores = Topology.detect().cores_for(0, 1)
    chosen = list(asked) if asked else cores[: ranks * threads]
    if len(set(chosen)) != ranks * threads or not set(chosen) <= os.sched_getaffinity(0):
        raise UsageError(
            f"{ranks} × {threads} threads on cores {chosen} of {sorted(os.sched_getaffinity(0))}; "
            f"expected a core for each thread, from those"
        )
    os.sched_setaffinity(0, chosen)
    return chosen


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config.json of a Llama model")
    parser.add_argument("--ranks", type=int, default=1, help="tpcpu's; llama.cpp takes ranks × threads threads")
    parser.add_argument("--threads", type=int, default=2, help="of each rank (default: %(default)s)")
    parser.add_argument("--cpus", type=int, nargs="+", help="the cores to use (default: the first)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="of each measurement in a round (default: %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the interpreter that has gguf and llama-cpp-python"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the GGUF files lie for the time (default: that for temporary files)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the GGUF files there, and leave them")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object as the last line, the rest to standard error"
    )
    args = parser.parse_args(argv)
    for name in ("ranks", "threads", "rounds", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


def main() -> int:
    """Compare and print; 1 where the comparison is void."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files go
    made = None
    try:
        shape = read_shape(args.config, args.formats)
        peer = Peer(args.peer_python, os.environ.get("LLAMA_BENCH"))
        args.cpus = pin(args.ranks, args.threads, args.cpus)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
        else:
            made = Path(tempfile.mkdtemp(prefix="tpcpu-bench-", dir=args.folder))
        say = Say(args.json)
        result = compare(args, peer, shape, args.keep or made, say)
        if result["void"]:
            say(
                f"VOID: llama.cpp takes less than {LEAST_FRACTION} of the read bandwidth; it was disturbed, or is "
                f"misbuilt: build it natively\n  {INSTALL.format(python=args.peer_python)}"
            )
    except TpcpuError as error:
        print(f"against_llama_cpp: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # no such folder, or no room in it
        print(f"against_llama_cpp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if made is not None:
            shutil.rmtree(made)
    if args.json:
        print(json.dumps(result))
    return int(result["void"])


if __name__ == "__main__":
    sys.exit(main())
