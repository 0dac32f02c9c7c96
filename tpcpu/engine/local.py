"""A model on the ranks of this job: tokenizer, requests and step loop together, on each of its ranks.

Knows which rank does what: rank 0 answers, the others follow, and all learn what came of it. Where the requests come
from, a script that every rank runs or a driver behind a socket, is for others to know.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tpcpu.engine import generation
from tpcpu.engine.engine import Engine, Options
from tpcpu.engine.pace import Slow
from tpcpu.engine.progress import Progress
from tpcpu.engine.requests import Chunk, Completion
from tpcpu.engine.scheduler import Scheduler
from tpcpu.errors import RankError, TpcpuError
from tpcpu.parallel.communicator import Communicator
from tpcpu.sampling import SamplingParams
from tpcpu.text import Prompt, Tokenizer, load_tokenizer

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


class Local:
    """A model on the ranks of this job, of which this process is one."""

    def __init__(
        self, path: str | Path, options: Options, communicator: Communicator, progress: Progress | None
    ) -> None:
        self._communicator = communicator
        self.is_root = communicator.is_root
        self._engine = Engine(path, communicator, options, progress)
        self._generator: generation.Generator | None = None
        tokenizer: Tokenizer | None = None
        error: Exception | None = None
        if self.is_root:
            try:
                checkpoint = self._engine.checkpoint
                tokenizer = load_tokenizer(checkpoint.path, checkpoint.config, checkpoint.generation_config)
                self._generator = generation.Generator(self._engine, tokenizer)
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

    @property
    def slow_ranks(self) -> list[Slow]:
        """On rank 0: ranks that the others have been seen to wait for."""
        return self._engine.slow_ranks

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

    def answers(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams],
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Completion] | None:  # fmt: skip
        """Rank 0 while the others follow: the answers to many prompts; None if `given_up` said so before a step."""
        assert self._tokenizer is not None
        assert self._generator is not None
        ids = [self._tokenizer.prompt_ids(prompt) for prompt in prompts]
        return self._generator.complete(list(zip(ids, params, strict=True)), given_up)

    def losses(self, text: str, window: int | None) -> Score:
        """Rank 0 while the others follow: the loss of one text."""
        assert self._tokenizer is not None
        assert self._generator is not None
        ids = self._tokenizer.encode(text)[:window]
        losses = self._generator.score(ids)
        return Score(sum(losses), len(losses))

    def together(self, work: Callable[[Scheduler, Tokenizer], T]) -> T:
        """Rank 0 works with the scheduler while the others follow; all have the result, or all raise. Collective."""

        def on_root() -> T:
            assert self._tokenizer is not None
            assert self._generator is not None
            return work(self._generator.scheduler, self._tokenizer)

        return self._together(on_root)

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[Chunk, None, None]:
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

    def generate(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Completion]:
        answers = self._together(lambda: self.answers(prompts, params))
        assert answers is not None
        return answers

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
