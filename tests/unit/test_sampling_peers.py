"""The filters against transformers' logits processors, an oracle that no one here wrote."""

from collections.abc import Iterator

import numpy as np
import pytest

from tpcpu.sampling import filters

torch = pytest.importorskip("torch", reason="needs the torch of the test extra")
processors = pytest.importorskip("transformers.generation.logits_process", reason="needs transformers")


def vocabularies() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(20)
    for size, spread in ((50, 1.0), (1000, 3.0), (5000, 8.0)):
        yield (generator.normal(size=size) * spread).astype(np.float32)


def kept_by_transformers(processor: object, logits: np.ndarray, temperature: float) -> np.ndarray:
    scores = processors.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    return np.isfinite(processor(None, scores)[0].numpy())  # type: ignore[operator]


@pytest.mark.parametrize("k", [1, 5, 49])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    for logits in vocabularies():
        kept = kept_by_transformers(processors.TopKLogitsWarper(k), logits, 1.0)
        ids, _ = filters.descending(logits, np.arange(logits.size), k)
        assert sorted(ids) == np.flatnonzero(kept).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("value", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_top_p_and_min_p_keep_what_transformers_keeps(temperature: float, value: float) -> None:
    for logits in vocabularies():
        ids, ordered = filters.descending(logits, np.arange(logits.size))
        weights = filters.weights(ordered, float(ordered[0]), temperature)
        for count, name in (
            (filters.keep_top_p(weights, value, float(weights.sum())), "TopPLogitsWarper"),
            (filters.keep_min_p(weights, value), "MinPLogitsWarper"),
        ):
            kept = kept_by_transformers(getattr(processors, name)(value), logits, temperature)
            assert sorted(ids[:count]) == np.flatnonzero(kept).tolist(), name


def test_the_chain_keeps_what_transformers_keeps() -> None:
    for logits in vocabularies():
        ids, ordered = filters.descending(logits, np.arange(logits.size), 40)
        weights = filters.weights(ordered, float(ordered[0]), 0.8)
        weights = weights[: filters.keep_top_p(weights, 0.95, float(weights.sum()))]
        weights = weights[: filters.keep_min_p(weights, 0.02)]
        scores = torch.from_numpy(logits)[None]
        for processor in (
            processors.TemperatureLogitsWarper(0.8),
            processors.TopKLogitsWarper(40),
            processors.TopPLogitsWarper(0.95),
            processors.MinPLogitsWarper(0.02),
        ):
            scores = processor(None, scores)
        theirs = torch.softmax(scores[0].double(), -1).numpy()
        assert sorted(ids[: weights.size]) == np.flatnonzero(theirs).tolist()
        np.testing.assert_allclose(weights / weights.sum(), theirs[ids[: weights.size]], rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_transformers_own(penalty: float) -> None:
    for logits in vocabularies():
        history = np.random.default_rng(3).integers(0, logits.size, 60)
        seen = np.bincount(history, minlength=logits.size) > 0
        processor = processors.RepetitionPenaltyLogitsProcessor(penalty)
        theirs = processor(torch.from_numpy(history)[None], torch.from_numpy(logits)[None])[0].numpy()
        np.testing.assert_array_equal(filters.penalise_repetition(logits, seen, penalty), theirs)
