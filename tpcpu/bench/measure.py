"""The whole measurement of one engine: ceilings and requests in turn, then a request with every operation timed."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpcpu.bench import ceilings
from tpcpu.bench.ceilings import Peaks, Reading, spread
from tpcpu.bench.joining import all_reduce_times, medians
from tpcpu.bench.lines import report_lines
from tpcpu.bench.requests import Prompts, Requests, following
from tpcpu.bench.resident import Peak
from tpcpu.bench.settings import Settings, check
from tpcpu.bench.times import CLASSES, Row, class_of, shares, table
from tpcpu.bench.weights import Tally, tally, token_bytes
from tpcpu.engine.engine import Engine, Options
from tpcpu.engine.progress import Progress
from tpcpu.engine.source import Source
from tpcpu.kernels import peak
from tpcpu.kernels.compile import spent_seconds
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.team import Team
from tpcpu.program.cost import part_read, unread
from tpcpu.program.operations import Attention, weights_of_token
from tpcpu.program.weights import Packed

_CALIBRATION_ROUNDS = 1 << 22


@dataclass
class Report:
    """What came of it. `result` has the keys of `bench --json`; `lines` are for people."""

    result: dict[str, object] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    operations: list[Row] = field(default_factory=list)
    step: float = 0.0
    """Seconds of a step while its operations were timed;"""
    prefill_operations: list[Row] = field(default_factory=list)
    prefill_step: float = 0.0
    """and of a token of a prompt."""


@dataclass(frozen=True)
class Timed:
    """Where the time of a step, or of a prompt's token, went."""

    times: dict[str, float]
    """Seconds by class, the mean over ranks."""
    step: float
    rows: list[Row]
    """Of rank 0."""

    @property
    def shares(self) -> dict[str, float]:
        whole = sum(self.times.values())
        return {kind: seconds / whole for kind, seconds in self.times.items()}


class _TimedRequest(NamedTuple):
    prefill: Timed
    decode: Timed


def measure(
    name: str, source: str | Source, communicator: Communicator, options: Options, settings: Settings,
    progress: Progress | None = None, note: Callable[[str], None] = lambda _: None,
) -> list[Report]:  # fmt: skip
    """Loads a model and measures it, once for each length of prompts. Collective; every rank gets the reports.

    Raises UserErrors on all ranks.
    """
    memory = Peak()
    with memory:
        engine = Engine(source, communicator, options, progress)
    try:
        check(engine, settings)
        prompts = Prompts(engine.vocabulary)
        found = []
        for tokens in settings.prompt_tokens:
            if len(settings.prompt_tokens) > 1:
                note(f"prompts of {tokens} tokens")
            found.append(_Measurement(engine, settings, tokens, prompts, memory, note).report(name, options))
        return found
    finally:
        engine.close()


class _Measurement:
    def __init__(
        self, engine: Engine, settings: Settings, prompt_tokens: int, prompts: Prompts, memory: Peak,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._engine, self._settings, self._prompt_tokens = engine, settings, prompt_tokens
        self._prompts, self._memory, self._note = prompts, memory, note
        self._communicator = engine.communicator
        assert engine.team is not None
        self._team = engine.team
        held = [each for each in engine.weights.values() if isinstance(each, Packed)]
        self._tallies: list[Tally] = self._communicator.all_gather_object(tally(held, unread(engine.program)))
        self._total = sum(self._tallies, Tally())

    def report(self, name: str, options: Options) -> Report:
        engine, settings, communicator, total = self._engine, self._settings, self._communicator, self._total
        compile_s = spent_seconds()
        reading = Reading(engine.arena, self._team, communicator)
        peaks = Peaks(self._team, communicator)
        self._note("warming up")
        self._request()
        found: dict[str, list[float]] = {}
        for number in range(settings.runs):
            reading.sweep()
            peaks.look()
            for key, value in self._request().items():
                found.setdefault(key, []).append(value)
            rate = found["decode_tokens_per_s"][-1]
            self._note(f"run {number + 1} of {settings.runs}: {rate:.2f} tokens/s, read {reading.best:.2f} GB/s")
            self._memory.look()
        reading.sweep()
        peaks.look()
        timed = self._timed()
        self._memory.look()

        prefills, decodes = found["prefill_tokens_per_s"], found["decode_tokens_per_s"]
        # What the machine can do may change from minute to minute: each run also stands beside the looks around it.
        fractions = [
            total.token_bytes * rate / settings.batch / 1e9 / reading.best_of(number, number + 2)
            for number, rate in enumerate(decodes)
        ]
        decode_rate, prefill_rate = float(np.median(decodes)), float(np.median(prefills))
        products = total.products + total.head_products / self._prompt_tokens
        prefill_gops = 2 * products * prefill_rate / 1e9
        integer = not options.exact and any(record.name.endswith("int8") for _, record in engine.stages)
        loads = communicator.all_gather_object((engine.load_seconds, engine.source.loaded_bytes, compile_s))
        slowest = max(seconds for seconds, *_ in loads)
        runs: dict[str, object] = {**found, "bandwidth_fraction": fractions, "read_bandwidth_gbs": reading.gbs}
        result: dict[str, object] = {
            "model": name,
            "ranks": communicator.size,
            "threads_per_rank": self._team.threads,
            "isa": engine.isa,
            "arithmetic": "int8" if integer else "float32",
            "prompt_tokens": self._prompt_tokens,
            "new_tokens": settings.new_tokens,
            "batch": settings.batch,
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
            "bandwidth_fraction": total.token_bytes * decode_rate / settings.batch / 1e9 / reading.best,
            "time_share": timed.decode.shares,
            "prefill_time_share": timed.prefill.shares,
            **self._attention(timed.prefill, peaks.fma_gflops),
            "load_s": slowest,
            "load_gbs": sum(nbytes for _, nbytes, _ in loads) / slowest / 1e9,
            "compile_s": max(seconds for *_, seconds in loads),
            "peak_rss_gb": sum(communicator.all_gather_object(self._memory.nbytes)) / 1e9,
            "slow_ranks": [asdict(each) for each in engine.slow_ranks],
            "runs": runs,
        }
        result |= {key: float(np.median(values)) for key, values in found.items() if key not in result}
        joining = {}
        if settings.message_bytes is not None:
            joining = all_reduce_times(communicator, self._team, settings.message_bytes)
            result |= medians(joining)
            result["runs"] = runs | joining
        lines = report_lines(result, reading, found, fractions)
        lines += [
            f"{name:<18} {spread(values)} us for {settings.message_bytes} bytes" for name, values in joining.items()
        ]
        return Report(result, lines, timed.decode.rows, timed.decode.step, timed.prefill.rows, timed.prefill.step)

    def _request(self) -> dict[str, float]:
        """Requests on all ranks, by what is measured of them on rank 0."""
        found: dict[str, float] = {}
        with following(self._engine) as leads:
            if leads:
                found = self._lead()
        return self._communicator.broadcast_object(found)

    def _lead(self) -> dict[str, float]:
        engine, settings, tokens = self._engine, self._settings, self._prompt_tokens
        prompts = self._prompts.random(settings.batch, tokens)
        with _drafting(engine, 0):
            requests = Requests(engine, prompts, settings.new_tokens)
            prefill = requests.prefill()
            found = {"prefill_tokens_per_s": settings.batch * tokens / prefill}
            found["decode_tokens_per_s"] = requests.decode()
            if settings.cached_tokens is not None:
                again = self._prompts.beginning(prompts[0], min(settings.cached_tokens, tokens - 1))
                cached = Requests(engine, [again], 1)
                found["ttft_ms"] = 1e3 * prefill
                found["cached_ttft_ms"] = 1e3 * cached.prefill()
                found["cached_ttft_ratio"] = found["cached_ttft_ms"] / found["ttft_ms"]
                cached.decode()
        if settings.replay is not None:
            found |= self._replay(settings.replay)
        return found

    def _replay(self, text: Sequence[int]) -> dict[str, float]:
        """The same answer with drafts and without."""
        engine, settings = self._engine, self._settings
        rates = {}
        for most in (engine.speculate, 0):
            with _drafting(engine, most):
                prompt = self._prompts.replayed(text, self._prompt_tokens)
                requests = Requests(engine, [prompt], settings.new_tokens, text)
                requests.prefill()
                rates[most] = requests.decode()
            if most:
                drafted, accepted, steps = requests.drafted, requests.accepted, requests.steps
        return {
            "speculate_tokens_per_s": rates[engine.speculate],
            "plain_tokens_per_s": rates[0],
            "speculate_ratio": rates[engine.speculate] / rates[0],
            "drafted_tokens": drafted,
            "accepted_tokens": accepted,
            "speculate_steps": steps,
        }

    def _timed(self) -> "_TimedRequest":
        """A request whose operations are timed."""
        engine, settings, communicator = self._engine, self._settings, self._communicator
        cycles_per_second = hertz(self._team)
        requests = None
        seconds = 1.0
        found = []
        for prompt in (True, False):
            with self._team.timed(len(engine.stages)) as cycles, following(engine) as leads, _drafting(engine, 0):
                if leads and prompt:
                    requests = Requests(
                        engine, self._prompts.random(settings.batch, self._prompt_tokens), settings.new_tokens
                    )
                    seconds = requests.prefill()
                elif requests is not None:
                    seconds = settings.batch * settings.new_tokens / requests.decode()
            tokens = self._prompt_tokens * settings.batch if prompt else settings.new_tokens
            step = communicator.broadcast_object(seconds) / tokens
            noted: NDArray[np.float64] = cycles / cycles_per_second / tokens
            of_ranks = communicator.all_gather_object(shares(engine.stages, noted, step))
            times = {kind: float(np.mean([each[kind] for each in of_ranks])) for kind in CLASSES}
            rows = table(engine.stages, noted, {} if prompt else self._record_bytes())
            found.append(Timed(times, step, rows))
        return _TimedRequest(*found)

    def _attention(self, prefill: "Timed", peak_gflops: float) -> dict[str, float]:
        """How fast a prompt's attention is, and all the rest of a prompt."""
        tokens = self._prompt_tokens
        operations = 0
        for op in self._engine.program.operations:
            if isinstance(op, Attention):
                # A query with each key, and each weight with a value: a multiply and an add for every dimension.
                most = min(op.window or tokens, tokens)
                pairs = most * (most + 1) // 2 + (tokens - most) * most
                operations += 4 * op.head_dim * op.heads * pairs
        total = sum(self._communicator.all_gather_object(operations))
        seconds = prefill.times["attention"] * tokens
        gflops = total / seconds / 1e9 if seconds else 0.0
        return {
            "prefill_attention_gflops": gflops,
            "prefill_attention_fraction": gflops / peak_gflops,
            "prefill_outside_attention_tokens_per_s": 1 / (sum(prefill.times.values()) - prefill.times["attention"]),
        }

    def _record_bytes(self) -> dict[int, int]:
        """Of the records that read weights or cache: bytes for one token, in the middle of the answer."""
        engine, settings = self._engine, self._settings
        length = self._prompt_tokens + settings.new_tokens // 2
        found: dict[int, int] = {}
        seen: set[int] = set()
        for number, (stage, kernel) in enumerate(engine.stages):
            kind = class_of(stage, kernel)
            if kind in ("linear", "conv") and id(stage) not in seen:
                seen.add(id(stage))
                held = [(op, engine.weights.get(w.key)) for op in stage.operations for w in weights_of_token(op)]
                read = (part_read(op) * token_bytes(each) for op, each in held if isinstance(each, Packed))
                found[number] = round(sum(read))
            for op in stage.operations:
                if isinstance(op, Attention) and id(stage) not in seen:
                    seen.add(id(stage))
                    kv = engine.program.kv[op.layer]
                    seen_positions = min(length, op.window or length)
                    found[number] = kv.rows * engine.cache.memory.kv.page_bytes(kv, seen_positions) * settings.batch
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


@contextmanager
def _drafting(engine: Engine, most: int) -> Iterator[None]:
    """Inside, requests draft at most so many tokens."""
    before, engine.speculate = engine.speculate, most
    try:
        yield
    finally:
        engine.speculate = before
