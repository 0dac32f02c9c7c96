"""The whole measurement of one engine: ceilings and requests in turn, then one request with every operation timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tpcpu.bench import ceilings
from tpcpu.bench.ceilings import STEADY, Peaks, Reading, spread
from tpcpu.bench.decode import Request, following
from tpcpu.bench.joining import all_reduce_times, medians
from tpcpu.bench.resident import Peak
from tpcpu.bench.times import CLASSES, Row, class_of, shares, table
from tpcpu.bench.weights import Tally, tally, token_bytes
from tpcpu.engine.engine import Engine, Options
from tpcpu.engine.progress import Progress
from tpcpu.engine.source import Source
from tpcpu.errors import UsageError
from tpcpu.kernels import peak
from tpcpu.kernels.compile import spent_seconds
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.team import Team
from tpcpu.program.operations import Attention, weights
from tpcpu.program.weights import Packed

_CALIBRATION_ROUNDS = 1 << 22


@dataclass(frozen=True)
class Settings:
    """What is run how often."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    runs: int = 5
    message_bytes: int | None = None
    """Of an all-reduce that is timed by itself."""


@dataclass
class Report:
    """What came of it. `result` has the keys of `bench --json`; `lines` are for people."""

    result: dict[str, object] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    operations: list[Row] = field(default_factory=list)
    step: float = 0.0
    """Seconds of a token while its operations were timed."""


def measure(
    name: str, source: str | Source, communicator: Communicator, options: Options, settings: Settings,
    progress: Progress | None = None, note: Callable[[str], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Loads a model and measures it. Collective; every rank gets the report. Raises UserErrors on all ranks."""
    memory = Peak()
    with memory:
        engine = Engine(source, communicator, options, progress)
    try:
        needed = settings.prompt_tokens + settings.new_tokens
        if needed > engine.context:
            raise UsageError(
                f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} need a context of "
                f"{needed}, but it is {engine.context}; take fewer, or raise --context where the model has more"
            )
        return _Measurement(engine, settings, memory, note).report(name, options)
    finally:
        engine.close()


class _Measurement:
    def __init__(self, engine: Engine, settings: Settings, memory: Peak, note: Callable[[str], None]) -> None:
        self._engine, self._settings, self._memory, self._note = engine, settings, memory, note
        self._communicator = engine.communicator
        assert engine.team is not None
        self._team = engine.team
        held = [each for each in engine.weights.values() if isinstance(each, Packed)]
        self._tallies: list[Tally] = self._communicator.all_gather_object(tally(held))
        self._total = sum(self._tallies, Tally())

    def report(self, name: str, options: Options) -> Report:
        engine, settings, communicator, total = self._engine, self._settings, self._communicator, self._total
        compile_s = spent_seconds()
        reading = Reading(engine.arena, self._team, communicator)
        peaks = Peaks(self._team, communicator)
        self._note("warming up")
        self._request()
        prefills, decodes = [], []
        for number in range(settings.runs):
            reading.sweep()
            peaks.look()
            prefill, decode = self._request()
            prefills.append(settings.prompt_tokens / prefill)
            decodes.append(settings.new_tokens / decode)
            self._note(f"run {number + 1} of {settings.runs}: {decodes[-1]:.2f} tokens/s, read {reading.best:.2f} GB/s")
            self._memory.look()
        reading.sweep()
        peaks.look()
        times, step, rows = self._timed()
        self._memory.look()

        # What the machine can do may change from minute to minute: each run also stands beside the looks around it.
        fractions = [
            total.token_bytes * rate / 1e9 / reading.best_of(number, number + 2) for number, rate in enumerate(decodes)
        ]
        decode_rate, prefill_rate = float(np.median(decodes)), float(np.median(prefills))
        products = total.products + total.head_products / settings.prompt_tokens
        prefill_gops = 2 * products * prefill_rate / 1e9
        integer = not options.exact and any(record.name.endswith("int8") for _, record in engine.stages)
        loads = communicator.all_gather_object((engine.load_seconds, engine.source.loaded_bytes, compile_s))
        slowest = max(seconds for seconds, *_ in loads)
        runs: dict[str, object] = {
            "prefill_tokens_per_s": prefills,
            "decode_tokens_per_s": decodes,
            "bandwidth_fraction": fractions,
            "read_bandwidth_gbs": reading.gbs,
        }
        result: dict[str, object] = {
            "model": name,
            "ranks": communicator.size,
            "threads_per_rank": self._team.threads,
            "isa": engine.isa,
            "arithmetic": "int8" if integer else "float32",
            "weight_bytes_per_token": total.token_bytes,
            "weight_bytes_per_rank": [each.held_bytes for each in self._tallies],
            "bits_per_nf4_weight": total.bits_per_nf4_weight,
            "read_bandwidth_gbs": reading.best,
            "prefill_tokens_per_s": prefill_rate,
            "prefill_gops": prefill_gops,
            "int8_peak_gops": peaks.int8_gops,
            "fma_peak_gflops": peaks.fma_gflops,
            "arithmetic_fraction": prefill_gops / (peaks.int8_gops if integer else peaks.fma_gflops),
            "decode_tokens_per_s": decode_rate,
            "decode_ms_per_token": 1e3 / decode_rate,
            "bandwidth_fraction": total.token_bytes * decode_rate / 1e9 / reading.best,
            "time_share": {kind: seconds / sum(times.values()) for kind, seconds in times.items()},
            "load_s": slowest,
            "load_gbs": sum(nbytes for _, nbytes, _ in loads) / slowest / 1e9,
            "compile_s": max(seconds for *_, seconds in loads),
            "peak_rss_gb": sum(communicator.all_gather_object(self._memory.nbytes)) / 1e9,
            "runs": runs,
        }
        joining = {}
        if settings.message_bytes is not None:
            joining = all_reduce_times(communicator, self._team, settings.message_bytes)
            result |= medians(joining)
            result["runs"] = runs | joining
        lines = _lines(result, settings, reading, times, prefills, decodes, fractions)
        lines += [
            f"{name:<18} {spread(values)} us for {settings.message_bytes} bytes" for name, values in joining.items()
        ]
        return Report(result, lines, rows, step)

    def _request(self) -> tuple[float, float]:
        """One request on all ranks; seconds of prompt and of later tokens, on rank 0."""
        engine, settings = self._engine, self._settings
        seconds = (1.0, 1.0)
        with following(engine) as leads:
            if leads:
                request = Request(engine, settings.prompt_tokens, settings.new_tokens)
                seconds = request.prefill(), request.decode()
                request.end()
        return self._communicator.broadcast_object(seconds)

    def _timed(self) -> tuple[dict[str, float], float, list[Row]]:
        """Seconds of a token by class, the mean over ranks; of the whole token; and rank 0's table of operations."""
        engine, settings, communicator = self._engine, self._settings, self._communicator
        cycles_per_second = hertz(self._team)
        request = None
        with following(engine) as leads:
            if leads:
                request = Request(engine, settings.prompt_tokens, settings.new_tokens)
                request.prefill()
        seconds = 1.0
        with self._team.timed(len(engine.stages)) as cycles, following(engine):
            if request is not None:
                seconds = request.decode()
                request.end()
        step = communicator.broadcast_object(seconds) / settings.new_tokens
        noted: NDArray[np.float64] = cycles / cycles_per_second / settings.new_tokens
        of_ranks = communicator.all_gather_object(shares(engine.stages, noted, step))
        times = {kind: float(np.mean([each[kind] for each in of_ranks])) for kind in CLASSES}
        return times, step, table(engine.stages, noted, self._record_bytes())

    def _record_bytes(self) -> dict[int, int]:
        """Of the records that read weights or cache: bytes for one token, in the middle of the answer."""
        engine, settings = self._engine, self._settings
        length = settings.prompt_tokens + settings.new_tokens // 2
        found: dict[int, int] = {}
        seen: set[int] = set()
        for number, (stage, kernel) in enumerate(engine.stages):
            kind = class_of(stage, kernel)
            if kind in ("linear", "conv") and id(stage) not in seen:
                seen.add(id(stage))
                held = [engine.weights.get((w.name, w.kind)) for op in stage.operations for w in weights(op)]
                found[number] = sum(token_bytes(each) for each in held if isinstance(each, Packed))
            for op in stage.operations:
                if isinstance(op, Attention) and id(stage) not in seen:
                    seen.add(id(stage))
                    kv = engine.program.kv[op.layer]
                    seen_positions = min(length, op.window or length)
                    found[number] = 2 * engine.cache.memory.kv.page_bytes(kv, seen_positions)
        return found


def hertz(team: Team) -> float:
    """What the cycle counter counts a second, by a record that takes long enough to be timed from outside.

    The largest of a few: whatever disturbs it makes the time outside longer.
    """
    sink = np.zeros((team.threads, 8), np.int64)
    record = ceilings.rounds_record(peak.fma_rounds, _CALIBRATION_ROUNDS, sink)
    found = []
    for _ in range(5):
        with team.timed(1) as cycles:
            begin = time.perf_counter()
            team.run(record)
            seconds = time.perf_counter() - begin
        found.append(float(cycles[0].sum()) / seconds)
    return max(found)


def _lines(
    result: dict[str, object], settings: Settings, reading: Reading, times: dict[str, float],
    prefills: list[float], decodes: list[float], fractions: list[float],
) -> list[str]:  # fmt: skip
    total = sum(times.values())
    parts = ", ".join(f"{kind} {100 * seconds / total:.1f} %" for kind, seconds in times.items())
    lines = [
        f"{result['model']}: {result['ranks']} x {result['threads_per_rank']} threads, {result['isa']}, "
        f"{result['arithmetic']} arithmetic; {settings.new_tokens} tokens after {settings.prompt_tokens}, "
        f"medians of {settings.runs} (least to most)",
        f"decode    {spread(decodes)} tokens/s, {result['decode_ms_per_token']:.3f} ms/token, "
        f"{result['weight_bytes_per_token']:,} bytes/token, {result['bandwidth_fraction']:.3f} of read bandwidth",
        f"          beside the reading just before and after: {spread(fractions, 3)} of it",
        f"prefill   {spread(prefills)} tokens/s, {result['prefill_gops']:.1f} GOPS, "
        f"{result['arithmetic_fraction']:.3f} of the peak",
        f"time      {parts}",
        f"peaks     {result['int8_peak_gops']:.0f} GOPS int8, {result['fma_peak_gflops']:.0f} GFLOPS float32",
        f"loading   {result['load_s']:.2f} s, {result['load_gbs']:.2f} GB/s; compiling {result['compile_s']:.2f} s; "
        f"at most {result['peak_rss_gb']:.2f} GB resident",
        f"reading   {result['read_bandwidth_gbs']:.2f} GB/s at best",
    ]
    if reading.steadiness < STEADY:
        lines.append(
            f"warning: read bandwidth fell to {reading.steadiness:.2f} of its best while this was measured: "
            f"neighbours, or another place on the host; measure again, or look at the runs beside their own readings"
        )
    lines += [f"  {max(values):6.2f} at best, {spread(values)}: {name}" for name, values in reading.gbs.items()]
    return lines
