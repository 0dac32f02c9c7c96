"""The step loop of one rank: weights, cache and program of a model, and the batches that go through them.

Rank 0 calls `step`; the others are in `follow`, which runs the same batches until rank 0 lets them go. One message a
step goes out, the candidates for the next tokens come back. Knows nothing of text and of requests.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine import room
from tpcpu.engine.cache import Cache, Layout
from tpcpu.engine.pace import Pace, Slow
from tpcpu.engine.progress import Progress, Silent
from tpcpu.engine.source import Folder, Source
from tpcpu.engine.speculation import MOST_DRAFTED
from tpcpu.errors import UsageError
from tpcpu.kernels import isa
from tpcpu.kernels.compile import Kernel, spent_seconds
from tpcpu.models import Model, read_config
from tpcpu.parallel import numa
from tpcpu.parallel.communicator import DEFAULT_FAULT_TIMEOUT, AllReduce, Communicator, Wire
from tpcpu.parallel.limits import Room, available, held_bytes
from tpcpu.parallel.partition import Share
from tpcpu.parallel.pulse import LOADING
from tpcpu.parallel.team import Team
from tpcpu.parallel.topology import Topology
from tpcpu.program.batch import Batch
from tpcpu.program.compiled import Compiled
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.program.lowering import Stage
from tpcpu.program.naming import exchanges, stage_names
from tpcpu.program.operations import Program
from tpcpu.program.weights import Packed

DEFAULT_CHUNK_TOKENS = 256
DEFAULT_PAGE_TOKENS = 64
DEFAULT_MAX_BATCH = 16

MOST_WANTED_BYTES = 64 << 20
"""Logits of one step are kept below this: a whole vocabulary for every token of a chunk would be many times a model."""

_MESSAGE = 256
"""int32 words that every step's message has; a longer one is followed by its rest."""

_LOOK = -1
"""In the place of a message's length: no batch follows, every rank tells how long it has waited."""


@dataclass(frozen=True)
class Options:
    """How a model is held and run. None: what the folder, or the machine, suggests."""

    format: str | None = None
    lm_head: str | None = None
    exact: bool = False
    context: int | None = None
    threads: int | None = None
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    page_tokens: int = DEFAULT_PAGE_TOKENS
    kv_cache: str | None = None
    cache_tokens: int | None = None
    """Positions that the cache holds, of all sequences together."""
    max_batch: int = DEFAULT_MAX_BATCH
    """Requests that run at the same time, at most."""
    speculate: int = 0
    """Tokens that are drafted at a time, at most."""
    wire: Wire = "float32"
    """What sums over hosts travel as."""
    read: str | None = None
    """shared: the hosts see one folder and read it together; local: each host has its own. None: found out."""
    fault_timeout: float = DEFAULT_FAULT_TIMEOUT
    """Seconds in which a lost or stopped rank becomes an error; for whoever connects the ranks."""
    exchange: bool = True
    """Without: a rank takes its own part for the sum. Its answers are wrong; its time is that of everything else."""
    share: Share | None = None
    """The part of a larger job that a lone rank runs by itself, which it cannot with `exchange`."""


@dataclass(frozen=True)
class Candidates:
    """What a token may be followed by: ids (candidates,) int64 and logits (candidates,) float32, of all ranks."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


class Engine:
    """A model on one rank. Building it is collective, and so is closing it."""

    def __init__(
        self,
        source: str | Path | Source,
        communicator: Communicator,
        options: Options,
        progress: Progress | None = None,
    ) -> None:
        """`source`: a folder's path, or what stands for a folder.

        Raises UserErrors, on all ranks together, for whatever is wrong with folder, options and rank count.
        """
        self.communicator = communicator
        self.progress = progress if progress is not None and communicator.is_root else Silent()
        self.source: Source = Folder(source, options.read) if isinstance(source, (str, Path)) else source
        self.share = options.share or Share(communicator.rank, communicator.size)
        self.team: Team | None = None
        error: Exception | None = None
        try:
            self._prepare(options)
        except Exception as problem:
            error = problem
        communicator.raise_together(error)
        self._load(options)

    def _prepare(self, options: Options) -> None:
        """All that needs no other rank: every mistake that can be found early is found here."""
        self.model: Model = read_config(self.source.open())
        self.program: Program = self.model.program(self.share)
        self.isa = isa.selected().name
        kv_cache = options.kv_cache or ("float32" if options.exact else "bf16")
        if kv_cache not in KV_FORMATS:
            raise UsageError(f"--kv-cache {kv_cache} is unknown; the formats are {', '.join(KV_FORMATS)}")
        self._layout = Layout(self.program, options.page_tokens, KV_FORMATS[kv_cache])
        room.check(options.context, options.cache_tokens, options.page_tokens, self.model)
        for name in ("chunk_tokens", "max_batch"):
            if getattr(options, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} is not at least 1")
        if not 0 <= options.speculate <= MOST_DRAFTED:
            raise UsageError(f"--speculate {options.speculate} is not between 0 and {MOST_DRAFTED}")
        self.max_batch, self.speculate = options.max_batch, options.speculate
        self.source.bind(self.model, self.program, options.format, options.lm_head)
        self.vocabulary = self.model.config.vocab_size
        size = self.share.size
        self._heads = [Share(rank, size).split(self.vocabulary) for rank in range(size)]
        if options.threads is not None and options.threads < 1:
            raise UsageError(f"--threads {options.threads} is not at least 1")

    def _gather_team(self, threads: int | None) -> Team:
        """This rank's threads, on the cores that are its own among the ranks of this host."""
        communicator = self.communicator
        topology = Topology.detect()
        masks = communicator.all_gather_object(sorted(topology.affinity))
        here = communicator.host_ranks
        self.cpus = topology.cores_for(communicator.host_rank, communicator.host_size, [masks[rank] for rank in here])
        self._nodes = topology.nodes_of(self.cpus)
        self._machine_nodes = len(topology.nodes)
        if threads is not None:
            self.cpus = [self.cpus[i % len(self.cpus)] for i in range(threads)]
        cpus_of = communicator.all_gather_object(self.cpus)
        on_host = [cpu for rank in here for cpu in cpus_of[rank]]
        crowded = len(set(on_host)) < len(on_host)
        pulse = communicator.pulse
        note = None if pulse is None else pulse.note
        return Team(self.cpus, pinned=not crowded, crowded=crowded, note=note)

    def _load(self, options: Options) -> None:
        communicator = self.communicator
        if (pulse := communicator.pulse) is not None:
            pulse.phase(LOADING)
        self._check_memory(options)
        self.team = self._gather_team(options.threads)
        begin, compiled = time.perf_counter(), spent_seconds()
        self.weights, self.arena = self.source.load(communicator, self.team, self.cpus, self.progress)
        self.load_seconds = time.perf_counter() - begin - (spent_seconds() - compiled)
        self._make_room(options)
        self._compiled = Compiled(
            self.program, self.weights, self.cache.memory, self.team,
            all_reduce=communicator.all_reduce(self.team, options.wire) if options.exchange else AllReduce("local"),
            exact=options.exact,
            tokens=self.chunk_tokens, wanted=self.most_wanted, report=self.progress.say,
        )  # fmt: skip
        self._report_locality()
        if pulse is not None:
            stages = [stage for stage, _ in self.stages]
            pulse.work(stage_names(self.program, stages), exchanges(stages))
        hosts = [communicator.hosts[host] for host in communicator.host_of]
        self._pace = Pace(hosts, communicator.all_gather_object(self.weight_bytes))

    def _available(self) -> Room:
        """The memory that is left for the ranks of this host together. Collective."""
        held = self.communicator.all_gather_object(held_bytes())
        found = available(held=sum(held[rank] for rank in self.communicator.host_ranks))
        return found or Room(1 << 40, "it may have")

    def _check_memory(self, options: Options) -> None:
        """Raises UsageError, on all ranks together, where a host has no room for the weights and the least cache."""
        communicator = self.communicator
        _, tokens = room.decide(options.context, options.cache_tokens, options.page_tokens, 0, self.model)
        cache = tokens // options.page_tokens * self._layout.bytes_of_page
        parts = communicator.all_gather_object((self.source.packed_bytes, cache))
        weights, caches = (sum(parts[rank][part] for rank in communicator.host_ranks) for part in range(2))
        free = self._available()
        error = room.shortage(weights, caches, tokens, options.page_tokens, free)
        communicator.raise_together(error if communicator.host_rank == 0 else None)

    def _make_room(self, options: Options) -> None:
        """The cache, as large as was asked for, or as memory allows beside the weights."""
        fitting = room.tokens_that_fit(self._layout, self._available().nbytes // self.communicator.host_size)
        self.context, tokens = room.decide(
            options.context, options.cache_tokens, options.page_tokens,
            min(self.communicator.all_gather_object(fitting)), self.model,
        )  # fmt: skip
        if options.context is None and self.context < room.default_context(self.model):
            why = f"memory is left for a cache of {tokens} tokens" if options.cache_tokens is None else "--cache-tokens"
            self.progress.say(f"context: {self.context} tokens ({why})")
        self.cache = Cache(
            self.program, context=self.context, page_tokens=options.page_tokens, sequences=self.max_batch,
            kv=self._layout.kv, tokens=tokens,
        )  # fmt: skip
        self.chunk_tokens = min(options.chunk_tokens, self.context)
        widest = max(len(rows) for rows in self._heads)
        self.most_wanted = max(1, min(self.chunk_tokens, MOST_WANTED_BYTES // (4 * widest)))

    @property
    def checkpoint(self) -> Checkpoint:
        """The folder that this engine was given."""
        assert isinstance(self.source, Folder)
        assert self.source.checkpoint is not None
        return self.source.checkpoint

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that this rank holds."""
        return sum(weight.nbytes for weight in self.weights.values() if isinstance(weight, Packed))

    @property
    def stages(self) -> list[tuple[Stage, Kernel]]:
        """For each record of a step the stage that it is of, and its kernel for one token."""
        return self._compiled.stages

    @property
    def locality(self) -> float:
        """The share of the pages of this rank's weights that lie on its own NUMA nodes. Not collective."""
        return numa.locality(self.arena.address, self.arena.nbytes, self._nodes)

    def _report_locality(self) -> None:
        """Where every rank's weights are, in rank order, on machines of more than one NUMA node."""
        line = numa.describe_locality(self.communicator.rank, self.locality, self.arena.nbytes, self._nodes)
        for each in self.communicator.all_gather_object(line):
            if self._machine_nodes > 1 or each.startswith("warning"):
                self.progress.say(each)

    @property
    def slow_ranks(self) -> list[Slow]:
        """Those that the others have been seen to wait for, on rank 0."""
        return list(self._pace.found.values())

    # Steps

    def step(self, batch: Batch) -> list[Candidates]:
        """Rank 0: runs a batch on all ranks; the candidates for each wanted token."""
        if self.communicator.size == 1:
            return self._run(batch)
        begin = time.perf_counter()
        self._send(batch.message)
        candidates = self._run(batch)
        if self._pace.is_due(time.perf_counter() - begin):
            self._look()
        return candidates

    def _look(self) -> None:
        """Whether a rank is slower than the others."""
        self._send(np.full(1, _LOOK, np.int32))
        if line := self._pace.judge(self._hand_in_waits() or []):
            self.progress.say(line)

    def _hand_in_waits(self) -> list[tuple[int, int]] | None:
        """What every rank has waited and walked, on rank 0."""
        assert self.team is not None
        parts = self.communicator.gather(np.array([self.team.waited]), [1] * self.communicator.size)
        return None if parts is None else [(int(part[0, 0]), int(part[0, 1])) for part in parts]

    def follow(self) -> None:
        """The other ranks: run what rank 0 sends, until it releases them."""
        assert self.team is not None
        with self.team.placed():
            while (message := self._receive()) is not None:
                if message[0] == _LOOK:
                    self._hand_in_waits()
                else:
                    self._run(Batch.read(message))

    def release(self) -> None:
        """Rank 0: lets the others leave `follow`."""
        self._send(np.zeros(1, np.int32))

    def close(self) -> None:
        """Ends the team and lets go of the checkpoint. Not collective."""
        if self.team is not None:
            self.team.close()
        self.source.close()

    def _send(self, message: NDArray[np.int32]) -> None:
        if self.communicator.size == 1:
            return
        first = np.zeros(_MESSAGE, np.int32)
        first[: min(len(message), _MESSAGE)] = message[:_MESSAGE]
        self.communicator.send_message(first)
        if len(message) > _MESSAGE:
            self.communicator.send_message(np.ascontiguousarray(message[_MESSAGE:]))

    def _receive(self) -> NDArray[np.int32] | None:
        first = np.empty(_MESSAGE, np.int32)
        self.communicator.wait_message(first)
        length = int(first[0])
        if length == 0:
            return None
        message = np.empty(max(length, _MESSAGE), np.int32)
        message[:_MESSAGE] = first
        if length > _MESSAGE:
            self.communicator.wait_message(message[_MESSAGE:])
        return message

    def _run(self, batch: Batch) -> list[Candidates]:
        logits = self._compiled.run(batch)
        if not len(batch.wanted):
            return []
        own = [min(max(batch.vocabulary - rows.start, 0), len(rows)) for rows in self._heads]
        logits = logits[:, : own[self.share.rank]]
        if batch.candidates:
            return self._gather_largest(logits, batch.candidates)
        parts = self.communicator.gather(np.ascontiguousarray(logits.T), own)
        if parts is None:
            return []
        whole = np.concatenate(parts).T
        ids = np.arange(whole.shape[1], dtype=np.int64)
        return [Candidates(ids, np.ascontiguousarray(row)) for row in whole]

    def _gather_largest(self, logits: NDArray[np.float32], count: int) -> list[Candidates]:
        """The `count` largest logits of each rank, the lowest ids first where level, for each wanted token."""
        wanted, own = logits.shape
        if self.communicator.size == 1:
            rows = [(row, _largest(row, min(count, own))) for row in logits]
            return [Candidates(chosen + self._heads[self.share.rank].start, row[chosen]) for row, chosen in rows]
        # For each wanted token: ids, -1 where a rank has fewer, and the bits of the logits. In lists, as most steps
        # want one candidate of one token: arrays are slow for so little, all the more behind a step, with cold caches.
        first = self._heads[self.share.rank].start
        mine = []
        for row, bits in zip(logits, logits.view(np.int32), strict=True):
            chosen = _largest(row, min(count, own)).tolist()
            missing = [-1] * (count - len(chosen))
            mine.append([[index + first for index in chosen] + missing, [bits.item(i) for i in chosen] + missing])
        parts = self.communicator.gather(np.array(mine, np.int32), [wanted] * self.communicator.size)
        if parts is None:
            return []
        result = []
        for found in zip(*(part.tolist() for part in parts), strict=True):
            pairs = [pair for ids, bits in found for pair in zip(ids, bits, strict=True) if pair[0] >= 0]
            table = np.array(pairs, np.int32).reshape(-1, 2)
            result.append(Candidates(table[:, 0].astype(np.int64), table[:, 1].copy().view(np.float32)))
        return result


def _largest(row: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values; of equal ones the lowest indices."""
    if count == 0:
        return np.empty(0, np.int64)
    if count == 1:
        return np.array([row.argmax()])
    threshold = np.partition(row, len(row) - count)[len(row) - count]
    above = np.flatnonzero(row > threshold)
    level = np.flatnonzero(row == threshold)
    return np.concatenate([above, level[: count - len(above)]])
