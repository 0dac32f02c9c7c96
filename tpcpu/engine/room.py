"""How many positions the cache of each rank holds, and how many a sequence may have.

Knows what was asked for and what memory is left; all ranks come to the same numbers, or raise together.
"""

from tpcpu.engine.cache import Layout
from tpcpu.errors import UsageError
from tpcpu.models import Model
from tpcpu.parallel.limits import Room

DEFAULT_CONTEXT = 8192

CONTEXTS = 4
"""Sequences of a whole context that the cache has room for, where nothing was asked for and memory allows it."""

SHARE = 0.5
"""Of the memory that is available once the weights are loaded: what the cache takes at most without being asked."""


def check(context: int | None, cache_tokens: int | None, page_tokens: int, model: Model) -> None:
    """Raises UsageError for sizes that are impossible, whatever memory there is."""
    most = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= most:
        raise UsageError(f"--context {context} is impossible: the model was made for 1 to {most} positions")
    if cache_tokens is not None and cache_tokens < page_tokens:
        raise UsageError(f"--cache-tokens {cache_tokens} is less than a page of {page_tokens} tokens")
    if context is not None and cache_tokens is not None and cache_tokens // page_tokens * page_tokens < context:
        raise UsageError(
            f"--cache-tokens {cache_tokens} in pages of {page_tokens} is too little for one sequence of "
            f"--context {context}; at least {-(-context // page_tokens) * page_tokens} works"
        )


def default_context(model: Model) -> int:
    """Positions of a sequence where nothing was asked for."""
    return min(model.config.max_position_embeddings, DEFAULT_CONTEXT)


def tokens_that_fit(layout: Layout, available: int) -> int:
    """Positions of whole pages that a rank has memory for, of the bytes that are available to it."""
    if not layout.bytes_of_page:
        return 1 << 30
    return int(SHARE * available) // layout.bytes_of_page * layout.page_tokens


def shortage(weights: int, cache: int, tokens: int, page_tokens: int, free: Room) -> UsageError | None:
    """What is raised where a host's ranks need more bytes, for weights and a cache of so many positions, than it has.

    `tokens`: what the cache will hold at least, whatever is free.
    """
    if weights + cache <= free.nbytes:
        return None
    less = max(free.nbytes - weights, 0) * tokens // max(cache, 1) // page_tokens * page_tokens
    mend = (
        f"a --context or --cache-tokens of {less} works"
        if less
        else "more memory, more hosts or a smaller --format work; tpcpu explain shows what a rank holds"
    )
    return UsageError(
        f"too little memory on this host: the weights of its ranks take {_gb(weights)} and a cache of {tokens} tokens "
        f"{_gb(cache)}, but {free.limit} {_gb(free.nbytes)}; {mend}"
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def decide(
    context: int | None, cache_tokens: int | None, page_tokens: int, fitting: int, model: Model
) -> tuple[int, int]:
    """(context, positions of the cache); `fitting`: what fits the rank that has the least room.

    What was asked for counts, and pages of the cache for one sequence of the whole context, always. Otherwise memory
    may shorten the context.
    """
    if cache_tokens is not None:
        cache_tokens = cache_tokens // page_tokens * page_tokens
        return context or min(default_context(model), cache_tokens), cache_tokens
    if context is None:
        context = max(min(default_context(model), fitting), page_tokens)
    whole = -(-context // page_tokens) * page_tokens
    return context, max(min(CONTEXTS * whole, fitting), whole)
