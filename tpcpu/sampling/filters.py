"""What sampling does to logits: pure functions on numpy arrays.

Penalties change logits. The filters top-k, top-p and min-p each keep a head of the tokens in descending order, so on
logits in that order a filter is a number: how many stay. The field's order is penalties, temperature, top-k, top-p,
min-p, each on what the one before left; that is transformers' order too, whose processors are the tests' oracle.
"""

import math

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]

_SIGN = np.uint32(1 << 31)


def penalise_repetition(logits: Logits, seen: npt.NDArray[np.bool_], penalty: float) -> Logits:
    """(tokens,) logits with those of `seen` tokens made less likely: positive divided by `penalty`, others
    multiplied."""
    factor = np.float32(penalty)
    return np.where(seen, np.where(logits > 0, logits / factor, logits * factor), logits)


def penalise_presence_and_frequency(
    logits: Logits, counts: npt.NDArray[np.int64], presence: float, frequency: float
) -> Logits:
    """(tokens,) logits less `presence` where `counts` is above 0 and less `frequency` times `counts`."""
    return (logits - np.float32(presence) * (counts > 0) - np.float32(frequency) * counts).astype(np.float32)


def descending(logits: Logits, ids: Ids, most: int = 0) -> tuple[Ids, Logits]:
    """The `most` largest logits (0: all) with their ids, largest first, the lowest id first where logits are level.

    `ids` are distinct, from 0 to 2**32 - 1. One unsigned key holds logit and id, so that a plain sort of numbers,
    numpy's fastest, gives the whole order, and the sorted keys hold the answer.
    """
    # -0.0 + 0.0 is 0.0: the two zeros are level
    keys = _turn((logits + np.float32(0)).view(np.uint32)).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= ids.astype(np.uint64)
    if most == 1:
        keys = keys.min(keepdims=True)
    elif 0 < most < keys.size:
        keys = np.sort(np.partition(keys, most - 1)[:most])
    else:
        keys.sort()
    sorted_logits = _turn((keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), sorted_logits


def _turn(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Bits of float32 to numbers that fall as the float rises, and back.

    With the sign clear the bits rise with the float: all but the sign are inverted. With it set they fall already.
    """
    magnitude_if_positive = ((bits >> np.uint32(31)) - np.uint32(1)) & ~_SIGN
    return bits ^ magnitude_if_positive


def probabilities(logits: Logits, temperature: float) -> Probabilities:
    """(tokens,) softmax of `logits` / `temperature`, logits in descending order."""
    # subtracting the largest first keeps even the smallest temperature from overflowing: 0 / t is 0, the rest -inf
    with np.errstate(over="ignore"):
        weights: Probabilities = np.exp((logits.astype(np.float64) - np.float64(logits[0])) / temperature)
    weights /= weights.sum()
    return weights


def keep_top_k(descending_probabilities: Probabilities, k: int) -> int:
    """How many tokens stay of the `k` first; k 0 keeps all."""
    return min(k, descending_probabilities.size) if k else descending_probabilities.size


def keep_top_p(descending_probabilities: Probabilities, p: float) -> int:
    """How many tokens it takes until their share of the sum reaches `p`; at least 1."""
    if p >= 1:
        return int(descending_probabilities.size)
    reached = np.cumsum(descending_probabilities)
    return min(int(np.searchsorted(reached, p * reached[-1])) + 1, descending_probabilities.size)


def keep_min_p(descending_probabilities: Probabilities, p: float) -> int:
    """How many tokens are at least `p` times as likely as the first; at least 1."""
    if p <= 0:
        return int(descending_probabilities.size)
    return int(np.searchsorted(-descending_probabilities, -p * descending_probabilities[0], side="right"))


def log_normaliser(logits: Logits) -> float:
    """log(sum(exp(logits))) in float64: a logit less this is its token's natural log probability."""
    largest = float(logits.max())
    return largest + math.log(float(np.exp(logits.astype(np.float64) - largest).sum()))
