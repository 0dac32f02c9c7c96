"""LLM: a model that answers, from Python.

In a plain Python process it runs here on one rank, or starts the ranks it needs and speaks to them; under `mpirun`
every rank runs the same script and gets the same answers. Knows how these three are chosen; what a rank does is in
`engine`, the ranks that a driver starts are in `ranks`.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.engine import DEFAULT_CHUNK_TOKENS, DEFAULT_MAX_BATCH, DEFAULT_PAGE_TOKENS, Options
from tpcpu.engine.local import Info, Local, Score
from tpcpu.engine.pace import Slow
from tpcpu.engine.progress import Progress
from tpcpu.engine.requests import Chunk, Completion
from tpcpu.errors import LaunchError, PromptError, UsageError
from tpcpu.models import read_config
from tpcpu.parallel.communicator import DEFAULT_FAULT_TIMEOUT, AllReduceKind, Wire, check_connection, connect
from tpcpu.parallel.launcher import in_launcher
from tpcpu.parallel.partition import Share
from tpcpu.parallel.topology import Topology
from tpcpu.ranks import Remote
from tpcpu.sampling import SamplingParams
from tpcpu.text import Prompt

__all__ = ["LLM", "Chunk", "Completion", "Info", "Score", "Slow"]

_EXIT_SECONDS = 2.0
"""How long the end of a program waits for the request of another thread, which ends with it."""


class Backend(Protocol):
    """What answers: ranks of this job, or ranks that this process started."""

    info: Info
    is_root: bool

    @property
    def slow_ranks(self) -> list[Slow]: ...
    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[Chunk, None, None]: ...
    def generate(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Completion]: ...
    def score(self, texts: Sequence[str], window: int | None) -> list[Score]: ...
    def close(self) -> None: ...


class LLM:
    """A model in memory; a context manager.

    `path`: a checkpoint folder, or a hub name found in the local Hugging Face cache. `ranks`: how many (default: one
    per socket, or per NUMA node under sub-NUMA clustering); under a launcher it is the launcher's. `format` (nf4,
    int8, bf16, float32) and `lm_head`: as stored by default, see `tpcpu quantize`. `exact`: float32 arithmetic.
    `context`: tokens of prompt and answer. `cache_tokens`: of all prompts and answers that the cache holds together;
    `max_batch`: how many are worked on at a time; `speculate`: how many tokens are drafted at most, from what the text
    said before, and verified in one step: it changes no answer. `read`: `shared` where all hosts see one folder, which
    the ranks then read once, together, `local` where each host reads its own copy; found out by default. `progress` is
    told of slow phases.

    Threads may share a model that this process runs or started: their requests take turns. A copy of the process that
    `fork` makes has no model.

    Raises UserErrors (see `tpcpu.errors`) for whatever is wrong with folder, options and rank count, on all ranks.
    """

    def __init__(
        self,
        path: str | Path,
        ranks: int | Literal["auto"] | None = None,
        format: str | None = None,  # noqa: A002
        lm_head: str | None = None,
        exact: bool = False,
        context: int | None = None,
        *,
        threads: int | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        kv_cache: str | None = None,
        cache_tokens: int | None = None,
        max_batch: int = DEFAULT_MAX_BATCH,
        speculate: int = 0,
        all_reduce: AllReduceKind = "window",
        wire: Wire = "float32",
        read: Literal["shared", "local"] | None = None,
        fault_timeout: float = DEFAULT_FAULT_TIMEOUT,
        progress: Progress | None = None,
    ) -> None:
        options = Options(
            format, lm_head, exact, context, threads, chunk_tokens, page_tokens, kv_cache, cache_tokens, max_batch,
            speculate, wire, read, fault_timeout,
        )  # fmt: skip
        check_connection(all_reduce, fault_timeout, wire)
        self._backend: Backend
        self._answer: Generator[Chunk, None, None] | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._process = os.getpid()
        if ranks in (None, "auto") and not in_launcher():
            ranks = Topology.detect().default_ranks()
        if ranks in (None, "auto", 1) or in_launcher():
            communicator = connect(all_reduce, fault_timeout=fault_timeout)
            if ranks not in (None, "auto", communicator.size):
                raise LaunchError(
                    f"{ranks} ranks asked for, but the launcher started {communicator.size}; "
                    f"leave the number to the launcher"
                )
            self._backend = Local(path, options, communicator, progress)
        else:
            assert isinstance(ranks, int)
            if ranks < 1:
                raise UsageError(f"{ranks} ranks are impossible; at least 1 works")
            # Whatever the folder tells about itself is found out before anything is started.
            with Checkpoint.open(path) as checkpoint:
                read_config(checkpoint.config).program(Share(0, ranks))
            self._backend = Remote(path, options, ranks, all_reduce, progress)
        # For a script that ends without closing its model.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def is_root(self) -> bool:
        """True on rank 0, and in a process that started the ranks itself."""
        return self._backend.is_root

    @property
    def info(self) -> Info:
        """What was loaded."""
        return self._backend.info

    @property
    def slow_ranks(self) -> list[Slow]:
        """Ranks that the others have been seen to wait for, since the model was loaded; empty on ranks other than 0."""
        return self._backend.slow_ranks

    def generate(
        self,
        prompts: Sequence[Prompt] | str | bytes,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answers in the order of `prompts`: texts, lists of token ids, or lists of messages (role, content).

        They are worked on together, `max_batch` at a time; no answer depends on the others. `params`: for all, or one
        for each. Collective under a launcher. Raises PromptError and TextError for prompts that cannot be answered.
        """
        several: Sequence[Prompt] = [prompts] if isinstance(prompts, (str, bytes)) else prompts
        if any(isinstance(prompt, Mapping) for prompt in several):
            raise PromptError("prompts: found a message by itself, expected lists of messages: [[{'role': ...}, ...]]")
        of_all = params or SamplingParams()
        each = [of_all] * len(several) if isinstance(of_all, SamplingParams) else list(of_all)
        if len(each) != len(several):
            raise UsageError(f"params: found {len(each)} for {len(several)} prompts, expected one for each, or for all")
        with self._lock:
            self._refuse_closed()
            self._end_answer()
            return self._backend.generate(several, each)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """The answer chunk by chunk; the last chunk has the completion. Closing the iterator ends the answer.

        There is one answer at a time: it ends when the next request begins, in whatever thread, and asking for more of
        it then raises a UsageError. Collective under a launcher, where ranks other than 0 see the chunks once the
        answer is complete.
        """
        self._refuse_closed()
        return self._chunks(prompt, params or SamplingParams())

    def _chunks(self, prompt: Prompt, params: SamplingParams) -> Generator[Chunk, None, None]:
        with self._lock:
            self._refuse_closed()
            self._end_answer()
            answer = self._answer = self._backend.stream(prompt, params)
        try:
            while True:
                with self._lock:
                    self._refuse_closed()
                    if self._answer is not answer:
                        raise UsageError(
                            "this answer ended when the next request began; take all of it first, or close it"
                        )
                    chunk = next(answer, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            with self._lock:
                if self._answer is answer:
                    self._end_answer()

    def score(self, texts: Sequence[str], window: int | None = None) -> list[Score]:
        """The loss of each text by itself, truncated to `window` tokens; its first token is not scored. Collective."""
        with self._lock:
            self._refuse_closed()
            self._end_answer()
            return self._backend.score(texts, window)

    def close(self) -> None:
        """Lets go of memory, threads and ranks, after the request of another thread. May be called twice."""
        self._close(-1)

    def _close(self, seconds: float) -> None:
        """`seconds`: to wait for another thread's request, -1 for ever; what is still at work then is left alone."""
        if os.getpid() != self._process or not self._lock.acquire(timeout=seconds):
            return
        try:
            if not self._closed:
                self._closed = True
                atexit.unregister(self._at_exit)
                self._end_answer()
                self._backend.close()
        finally:
            self._lock.release()

    def _end_answer(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def _refuse_closed(self) -> None:
        if os.getpid() != self._process:
            raise UsageError("the model belongs to the process that forked this one; open one here with LLM(path)")
        if self._closed:
            raise UsageError("the model is closed; open it again with LLM(path)")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(reference: "weakref.ref[LLM]") -> None:
    llm = reference()
    if llm is not None:
        llm._close(_EXIT_SECONDS)
