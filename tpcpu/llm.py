"""LLM: a model that answers, from Python.

In a plain Python process it runs here on one rank, or starts the ranks it needs and speaks to them; under `mpirun`
every rank runs the same script and gets the same answers. Knows how these three are chosen; what a rank does is in
`engine`, the ranks that a driver starts are in `ranks`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.engine import DEFAULT_CHUNK_TOKENS, DEFAULT_PAGE_TOKENS, Engine, Options
from tpcpu.engine.generation import Chunk, Completion, Generator
from tpcpu.engine.progress import Progress
from tpcpu.errors import LaunchError, RankError, TpcpuError, UsageError
from tpcpu.models import read_config
from tpcpu.parallel.communicator import AllReduceKind, Communicator, connect
from tpcpu.parallel.launcher import in_launcher
from tpcpu.parallel.partition import Share
from tpcpu.parallel.topology import Topology
from tpcpu.sampling import SamplingParams
from tpcpu.text import Tokenizer, load_tokenizer

__all__ = ["LLM", "Chunk", "Completion", "Info", "Score"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Info:
    """What a loaded model is, for whoever shows it."""

    ranks: int
    threads: int
    isa: str
    context: int
    exact: bool
    has_chat_template: bool
    weight_bytes: list[int]
    """Bytes of packed weights, by rank."""


@dataclass(frozen=True)
class Score:
    """The loss of one text: the sum of negative log likelihoods in nats, over so many tokens."""

    nll: float
    tokens: int


class Backend(Protocol):
    """What answers: ranks of this job, or ranks that this process started."""

    info: Info
    is_root: bool

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Chunk]: ...
    def score(self, texts: Sequence[str], window: int | None) -> list[Score]: ...
    def close(self) -> None: ...


class LLM:
    """A model in memory; a context manager.

    `path`: a checkpoint folder, or a hub name found in the local Hugging Face cache. `ranks`: how many (default: one
    per socket, or per NUMA node under sub-NUMA clustering); under a launcher it is the launcher's. `format` (nf4,
    int8, bf16, float32) and `lm_head`: as stored by default, see `tpcpu quantize`. `exact`: float32 arithmetic.
    `context`: tokens of prompt and answer. `progress` is told of slow phases.

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
        all_reduce: AllReduceKind = "ordered",
        progress: Progress | None = None,
    ) -> None:
        options = Options(format, lm_head, exact, context, threads, chunk_tokens, page_tokens, kv_cache)
        self._backend: Backend
        if ranks in (None, "auto") and not in_launcher():
            ranks = Topology.detect().default_ranks()
        if ranks in (None, "auto", 1) or in_launcher():
            communicator = connect(all_reduce)
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
            from tpcpu.ranks import Remote

            self._backend = Remote(path, options, ranks, all_reduce, progress)

    @property
    def is_root(self) -> bool:
        """True on rank 0, and in a process that started the ranks itself."""
        return self._backend.is_root

    @property
    def info(self) -> Info:
        """What was loaded."""
        return self._backend.info

    def generate(self, prompts: Sequence[Prompt] | str, params: SamplingParams | None = None) -> list[Completion]:
        """Answers in the order of `prompts`: texts, lists of token ids, or lists of messages (role, content).

        Collective under a launcher. Raises PromptError and TextError for prompts that cannot be answered.
        """
        several: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        return [_last(self.stream(prompt, params)) for prompt in several]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """The answer chunk by chunk; the last chunk has the completion. Closing the iterator ends the answer.

        Collective under a launcher, where ranks other than 0 see the chunks once the answer is complete.
        """
        return self._backend.stream(prompt, params or SamplingParams())

    def score(self, texts: Sequence[str], window: int | None = None) -> list[Score]:
        """The loss of each text by itself, truncated to `window` tokens; its first token is not scored. Collective."""
        return self._backend.score(texts, window)

    def close(self) -> None:
        """Lets go of memory, threads and ranks. May be called twice."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _last(chunks: Iterator[Chunk]) -> Completion:
    completion = None
    for chunk in chunks:
        completion = chunk.completion
    assert completion is not None
    return completion


class Local:
    """A model on the ranks of this job, of which this process is one."""

    def __init__(
        self, path: str | Path, options: Options, communicator: Communicator, progress: Progress | None
    ) -> None:
        self._communicator = communicator
        self.is_root = communicator.is_root
        self._engine = Engine(path, communicator, options, progress)
        self._generator: Generator | None = None
        tokenizer: Tokenizer | None = None
        error: Exception | None = None
        if self.is_root:
            try:
                checkpoint = self._engine.checkpoint
                assert checkpoint is not None
                tokenizer = load_tokenizer(checkpoint.path, checkpoint.config, checkpoint.generation_config)
                self._generator = Generator(self._engine, tokenizer)
            except TpcpuError as problem:
                error = problem
        self._communicator.raise_together(error)
        self._tokenizer = tokenizer
        self.info = Info(
            ranks=communicator.size,
            threads=len(self._engine.cpus),
            isa=self._engine.isa,
            context=self._engine.context,
            exact=options.exact,
            has_chat_template=communicator.broadcast_object(tokenizer is not None and tokenizer.has_chat_template),
            weight_bytes=communicator.all_gather_object(self._engine.weight_bytes),
        )

    def follow(self) -> None:
        """Ranks other than 0: run what rank 0 sends until it releases them."""
        self._engine.follow()

    def release(self) -> None:
        """Rank 0: lets the others leave `follow`."""
        self._engine.release()

    def answer(self, prompt: Prompt, params: SamplingParams) -> Iterator[Chunk]:
        """Rank 0 while the others follow: chunk by chunk."""
        assert self._tokenizer is not None
        assert self._generator is not None
        return self._generator.stream(self._tokenizer.prompt_ids(prompt), params)

    def losses(self, text: str, window: int | None) -> Score:
        """Rank 0 while the others follow: the loss of one text."""
        assert self._tokenizer is not None
        assert self._generator is not None
        ids = self._tokenizer.encode(text)[:window]
        losses = self._generator.score(ids)
        return Score(sum(losses), len(losses))

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Chunk]:
        if self._communicator.size == 1:
            yield from self.answer(prompt, params)
            return
        if not self.is_root:
            self.follow()
            yield from _outcome(self._communicator)
            return
        chunks: list[Chunk] = []
        error: BaseException | None = None
        try:
            for chunk in self.answer(prompt, params):
                chunks.append(chunk)
                yield chunk
        except BaseException as problem:
            error = problem
            raise
        finally:
            self.release()
            _announce(self._communicator, chunks, error)

    def score(self, texts: Sequence[str], window: int | None) -> list[Score]:
        return self._together(lambda: [self.losses(text, window) for text in texts])

    def _together(self, work: Callable[[], T]) -> T:
        """Rank 0 works while the others follow; all have the result, or all raise."""
        if self._communicator.size == 1:
            return work()
        if not self.is_root:
            self.follow()
            outcome: T = _outcome(self._communicator)
            return outcome
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
            return result
        except BaseException as problem:
            error = problem
            raise
        finally:
            self.release()
            _announce(self._communicator, result, error)

    def close(self) -> None:
        self._engine.close()


def _announce(communicator: Communicator, result: object, error: BaseException | None) -> None:
    """Rank 0 tells the others what came of it."""
    if error is None or isinstance(error, GeneratorExit):
        communicator.broadcast_object((result, None, ""))
    else:
        kind = type(error) if isinstance(error, TpcpuError) else RankError
        text = str(error) if isinstance(error, TpcpuError) else f"rank 0: {type(error).__name__}: {error}"
        communicator.broadcast_object((None, kind, text))


def _outcome(communicator: Communicator) -> Any:
    """The others hear it."""
    outcome: tuple[Any, type[TpcpuError] | None, str] | None = None
    result, kind, text = communicator.broadcast_object(outcome) or (None, None, "")
    if kind is not None:
        raise kind(text)
    return result
