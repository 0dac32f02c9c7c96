"""What sampling does to logits: pure functions on numpy arrays.

Penalties change logits. The filters top-k, top-p and min-p each keep a head of the tokens in descending order, so on
logits in that order a filter is a number: how many stay. Top-k is the order itself, cut after k (`descending`). The
field's order is penalties, temperature, top-k, top-p, min-p, each on what the one before left; that is transformers'
order too, whose processors are the tests' oracle.
"""

import math

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

_SIGN = np.uint32(1 << 31)


def penalise_repetition(logits: Logits, seen: npt.NDArray[np.bool_], penalty: float) -> Logits:
    """(tokens,) logits with those of `seen` tokens made less likely: positive / `penalty`, others * `penalty`."""
    places = np.flatnonzero(seen)
    before = logits[places]
    factor = np.float32(penalty)
    after = logits.copy()
    after[places] = np.where(before > 0, before / factor, before * factor)
    return after


def penalise_presence_and_frequency(
    logits: Logits, counts: npt.NDArray[np.int64], presence: float, frequency: float
) -> Logits:
    """(tokens,) logits less `presence` where `counts` is above 0 and less `frequency` times `counts`."""
    places = np.flatnonzero(counts)
    after = logits.copy()
    after[places] -= np.float32(presence) + np.float32(frequency) * counts[places].astype(np.float32)
    return after


def descending(logits: Logits, ids: Ids, most: int = 0) -> tuple[Ids, Logits]:
    """The `most` largest logits (0: all) with their ids, largest first, the lowest id first where logits are level.

    `ids` are distinct, from 0 to 2**32 - 1. One unsigned key holds logit and id, so that a plain sort of numbers,
    numpy's fastest, gives the whole order, and the sorted keys hold the answer.
    """
    shortened = 0 < most < logits.size
    if shortened:
        # in float32, before the wider keys: a large vocabulary costs mostly the memory that it passes through
        last = logits.max() if most == 1 else np.partition(logits, logits.size - most)[logits.size - most]
        near = np.flatnonzero(logits >= last)
        logits, ids = logits[near], ids[near]
    # -0.0 + 0.0 is 0.0: the two zeros are level
    keys = _turn((logits + np.float32(0)).view(np.uint32)).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= ids.astype(np.uint64)
    keys.sort()
    if shortened:
        keys = keys[:most]
    sorted_logits = _turn((keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), sorted_logits


def _turn(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Bits of float32 to numbers that fall as the float rises, and back.

    With the sign clear the bits rise with the float: all but the sign are inverted. With it set they fall already.
    """
    magnitude_if_positive = ((bits >> np.uint32(31)) - np.uint32(1)) & ~_SIGN
    return bits ^ magnitude_if_positive


def weights(logits: Logits, largest: float, temperature: float) -> Weights:
    """(tokens,) exp((logits - largest) / temperature): in proportion to the probabilities, the likeliest weighs 1."""
    found = logits.astype(np.float64)
    found -= largest
    # the largest is subtracted first, so the smallest temperature does not overflow: 0 / t is 0, the rest -inf
    with np.errstate(over="ignore"):
        found /= temperature
    np.exp(found, out=found)
    return found


def keep_top_p(descending_weights: Weights, p: float, total: float) -> int:
    """How many tokens it takes until their share of `total` reaches `p`; all of them where it does not, and for 1."""
    if p >= 1:
        return int(descending_weights.size)
    reached = np.cumsum(descending_weights)
    return min(int(np.searchsorted(reached, p * total)) + 1, descending_weights.size)


def keep_min_p(descending_weights: Weights, p: float) -> int:
    """How many tokens are at least `p` times as likely as the first; at least 1."""
    if p <= 0:
        return int(descending_weights.size)
    return int(np.searchsorted(-descending_weights, -p * descending_weights[0], side="right"))


def log_normaliser(logits: Logits) -> float:
    """log(sum(exp(logits))) in float64: a logit less this is its token's natural log probability."""
    largest = float(logits.max())
    return largest + math.log(float(weights(logits, largest, 1.0).sum()))
