"""What is measured, how often, and whether an engine has room for it."""

from dataclasses import dataclass

from tpcpu.engine.engine import Engine
from tpcpu.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """What is run how often."""

    prompt_tokens: tuple[int, ...] = (128,)
    """One measurement for each; all on the same weights."""
    new_tokens: int = 64
    runs: int = 5
    batch: int = 1
    """Requests that are worked on together."""
    cached_tokens: int | None = None
    """Of a prompt whose beginning is in the cache, timed beside one whose is not."""
    replay: tuple[int, ...] | None = None
    """A text that is drafted from and that the answer follows, with drafts and without."""
    message_bytes: int | None = None
    """Of an all-reduce that is timed by itself."""


def check(engine: Engine, settings: Settings) -> None:
    """Raises UsageError for what this engine has no room for."""
    longest, new = max(settings.prompt_tokens), settings.new_tokens
    needed = longest + new
    if needed > engine.context:
        raise UsageError(
            f"--prompt-tokens {longest} and --new-tokens {new} need a context of "
            f"{needed}, but it is {engine.context}; take fewer, or raise --context where the model has more"
        )
    if settings.batch > min(engine.max_batch, engine.chunk_tokens, engine.most_wanted):
        raise UsageError(
            f"--batch {settings.batch} is more than a step can take; raise --chunk-tokens above {engine.chunk_tokens}"
        )
    together = settings.batch * -(-needed // engine.cache.page_tokens)
    if together > engine.cache.pages.count:
        raise UsageError(
            f"--batch {settings.batch} with {needed} tokens each needs a cache of {together} pages, "
            f"but it has {engine.cache.pages.count}; raise --cache-tokens"
        )
    if settings.replay is not None and len(settings.replay) <= needed:
        raise UsageError(
            f"--replay: the text has {len(settings.replay)} tokens, but --prompt-tokens {longest} and "
            f"--new-tokens {new} need {needed + 1}; take fewer, or a longer text"
        )
    if settings.replay is not None and max(settings.replay) >= engine.vocabulary:
        raise UsageError(
            f"--replay: token {max(settings.replay)} is none of this model, which has {engine.vocabulary}; "
            "take the tokenizer that belongs to it"
        )
