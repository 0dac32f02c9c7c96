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


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (filters.keep_top_k, "TopKLogitsWarper", (1, 5, 49)),
        (filters.keep_top_p, "TopPLogitsWarper", (0.05, 0.5, 0.9, 0.99)),
        (filters.keep_min_p, "MinPLogitsWarper", (0.01, 0.1, 0.9)),
    ],
)
def test_filters_keep_what_transformers_keeps(ours, theirs, values, temperature) -> None:
    for logits in vocabularies():
        ids, ordered = filters.descending(logits, np.arange(logits.size))
        probabilities = filters.probabilities(ordered, temperature)
        for value in values:
            kept = kept_by_transformers(getattr(processors, theirs)(value), logits, temperature)
            assert sorted(ids[: ours(probabilities, value)]) == np.flatnonzero(kept).tolist()


def test_the_chain_keeps_what_transformers_keeps() -> None:
    for logits in vocabularies():
        ids, ordered = filters.descending(logits, np.arange(logits.size))
        weights = filters.probabilities(ordered, 0.8)
        weights = weights[: filters.keep_top_k(weights, 40)]
        weights = weights[: filters.keep_top_p(weights, 0.95)]
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
