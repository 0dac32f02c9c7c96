"""Half an hour of `batch` with arrivals and cancellations beside it: memory of all ranks stays as it is after warm-up.

    python tests/e2e/soak.py --minutes 30 --ranks 2

A batch is stopped and taken up again at random steps, its output begun anew whenever it is done; meanwhile requests of
others arrive and are cancelled, also before they are read. The last line is JSON: anonymous and shared memory over all
ranks, medians of twelve windows after warm-up, and how far one is from the first; and what share of the time journal,
guardian and witness took. Exit code 1: memory has not been flat.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tpcpu.batch.runner import Runner
from tpcpu.batch.source import Source
from tpcpu.batch.store import Store
from tpcpu.engine.engine import Options
from tpcpu.engine.local import Local
from tpcpu.engine.requests import Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.parallel import launcher
from tpcpu.parallel.communicator import connect
from tpcpu.parallel.guardian import guardian
from tpcpu.sampling import SamplingParams
from tpcpu.text import Tokenizer

MODEL = Path(__file__).parents[1] / "data" / "yuan-tiny"
WINDOWS = 12
LINES, COMPANY, LONGEST = 30, 4, 200
SHARE = 0.01
_TICK = os.sysconf("SC_CLK_TCK")


class Soak:
    """Rank 0's part."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, pids: Sequence[int], folder: Path, seed: int
    ) -> None:
        self._scheduler, self._tokenizer, self._pids, self._folder = scheduler, tokenizer, pids, folder
        self._random = random.Random(seed)
        self._company: list[Request] = []
        self._samples: list[tuple[float, int]] = []
        self._stop_at = self._sampled = 0.0
        self.counts = {"batches": 0, "runs": 0, "answers": 0, "arrived": 0, "cancelled": 0, "new_tokens": 0}
        self._seconds = self._journal_seconds = 0.0

    def run(self, warm_up: float, seconds: float) -> dict[str, Any]:
        """So many seconds in all; what is to be told of them."""
        began = time.monotonic()
        self._fill()
        while time.monotonic() < began + seconds:
            self._batch(began + seconds)
        steady = [(when - began, size) for when, size in self._samples if when - began >= warm_up]
        width = (seconds - warm_up) / WINDOWS
        windows = [
            statistics.median(size for when, size in steady if i * width <= when - warm_up < (i + 1) * width)
            for i in range(WINDOWS)
        ]
        change = max(abs(window / windows[0] - 1) for window in windows)
        return {
            **self.counts, "seconds": round(seconds), "ranks": len(self._pids),
            "memory_mb": [round(window / 1e6, 2) for window in windows], "change": round(change, 5),
            "journal_share": round(self._journal_seconds / self._seconds, 5),
            "supervision_share": round(supervision_seconds() / (time.monotonic() - began), 5),
            "flat": change <= SHARE,
        }  # fmt: skip

    def _fill(self) -> None:
        """All pages of the cache in use once, and the longest of batches: warm-up does not have to wait for these."""
        for _ in range(8):
            self._scheduler.submit(self._prompt(400), SamplingParams(max_tokens=100, ignore_eos=True))
        while self._scheduler.busy:
            self._scheduler.step()

    def _batch(self, until: float) -> None:
        """One output from nothing to its end, in as many runs as it takes."""
        given, output = self._folder / "in.jsonl", self._folder / "out.jsonl"
        for path in self._folder.iterdir():
            path.unlink()
        lines = [
            {
                "id": n, "prompt": self._prompt(LONGEST), "max_tokens": self._random.randint(1, LONGEST),
                "temperature": self._random.choice([0, 0.8]), "seed": n, "ignore_eos": True,
                "stop": self._random.choice([None, ["zq", "qz"]]), "logprobs": self._random.choice([None, 2]),
            }
            for n in range(LINES)
        ]  # fmt: skip
        given.write_text("".join(json.dumps(line) + "\n" for line in lines))
        while time.monotonic() < until:
            source = Source(given)
            job = {"input": source.digest, "model": "", "settings": {"context": None}}
            store = Store(output, job, restart=False, wait_seconds=0)
            self._stop_at = min(time.monotonic() + self._random.expovariate(1 / 8), until)
            try:
                store.begin(512)
                outcome = Runner(
                    self._scheduler, self._tokenizer, source, store, SamplingParams(),
                    most=8, stop=self._after_step, progress=self,
                ).run()  # fmt: skip
            finally:
                store.close()
                source.close()
            self.counts["runs"] += 1
            self.counts["new_tokens"] += outcome.new_tokens
            self._seconds += outcome.seconds
            self._journal_seconds += outcome.journal_seconds
            if not outcome.stopped:
                assert (outcome.answers, outcome.errors) == (LINES, 0), outcome
                self.counts["answers"] += outcome.answers
                self.counts["batches"] += 1
                return

    def show(self, done: int, total: int, tokens: int) -> None:
        """A batch's progress, which nobody watches."""

    def _after_step(self) -> bool:
        """Company comes and goes; whether the batch is to be stopped."""
        now = time.monotonic()
        if now - self._sampled > 0.25:
            self._sampled = now
            self._samples.append((now, sum(map(resident, self._pids))))
        self._company = [request for request in self._company if not request.finished]
        if len(self._company) < COMPANY and self._random.random() < 0.05:
            params = SamplingParams(max_tokens=LONGEST, temperature=1.0, ignore_eos=True)
            self._company.append(self._scheduler.submit(self._prompt(LONGEST), params))
            self.counts["arrived"] += 1
        if self._company and self._random.random() < 0.02:
            self._scheduler.cancel(self._company.pop(self._random.randrange(len(self._company))))
            self.counts["cancelled"] += 1
        return now >= self._stop_at

    def _prompt(self, longest: int) -> list[int]:
        return [self._random.randrange(100, 4000) for _ in range(self._random.randint(1, longest))]


def resident(pid: int) -> int:
    """Bytes of anonymous and shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def supervision_seconds() -> float:
    """Of processor time: this rank's guardian and the host's witness, which began with the ranks."""
    watching = guardian()
    if watching is None:
        return 0.0
    (thread,) = (each for each in threading.enumerate() if each.name == "tpcpu-guardian")
    paths = [Path(f"/proc/self/task/{thread.native_id}/stat"), Path(f"/proc/{watching.pulse.witness[0]}/stat")]
    fields = [path.read_text().rpartition(")")[2].split() for path in paths]
    return sum(int(each[11]) + int(each[12]) for each in fields) / _TICK


def soak(args: argparse.Namespace) -> int:
    """One rank's part; the exit code."""
    communicator = connect("window", fault_timeout=10.0)
    model = Local(args.model, Options(speculate=args.speculate), communicator, None)
    pids = communicator.all_gather_object(os.getpid())

    def work(scheduler: Scheduler, tokenizer: Tokenizer) -> bool:
        with tempfile.TemporaryDirectory(prefix="tpcpu-soak-") as folder:
            run = Soak(scheduler, tokenizer, pids, Path(folder), args.seed)
            result = run.run(args.warm_up, 60 * args.minutes)
        print(json.dumps(result), flush=True)
        return bool(result["flat"])

    is_flat = model.together(work)
    model.close()
    return 0 if is_flat else 1


def main() -> int:
    """Starts the ranks, unless it is one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=60.0, metavar="SECONDS", help="of these minutes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--speculate", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    if args.ranks > 1 and not launcher.in_launcher():
        return launcher.run(args.ranks, [sys.executable, *sys.argv])
    return soak(args)


if __name__ == "__main__":
    sys.exit(main())
