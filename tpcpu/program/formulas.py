"""What operations compute, in numpy: formulas as in a paper, and arithmetic with weights of 4 and 8 bits.

`reference.py` calls them for the buffers of a program; tests call them by themselves. x is (tokens, width) everywhere.
float32 or float64; they fix the order in which sums are joined where that order is promised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tpcpu.program.operations import BLOCK, PIECE, Activation, Clamp, Route, Scoring, Weight
from tpcpu.program.rope import Rope, tables

Array = NDArray[Any]

SPAN = 16
"""Blocks whose products are added in order before they join the sum; spans are joined in order."""


@dataclass(frozen=True)
class MatrixValues:
    """One stored tensor, whole, as a matrix `(rows, columns)`; weights may share a scale by blocks of 64 in a row.

    values: what is stored, `(rows, columns)`: floats, int8 integers, or the code values of NF4 (in -1 to 1).
    scales: float32 `(rows, blocks)`, a weight being value × scale; None where the values are the weights.
    levels: the 8-bit arithmetic multiplies rint(levels × value): 127 for NF4, 2 for MXFP4, 1 for int8.
    halves: how many scales a block of 64 has, 2 in MXFP4.
    """

    values: Array
    scales: Array | None = None
    levels: int = 1
    halves: int = 1

    @classmethod
    def nf4(cls, codes: Array, scales: Array, table: Array) -> "MatrixValues":
        """`codes` uint8 (rows, columns) index the 16 values of `table`; `scales` float32 (rows, columns / 64)."""
        return cls(np.asarray(table, np.float32)[codes], scales, levels=127)

    @classmethod
    def int8(cls, values: Array, scales: Array) -> "MatrixValues":
        """`values` int8 (rows, columns); `scales` float32 (rows, columns / 64)."""
        return cls(values, scales)

    @classmethod
    def mxfp4(cls, codes: Array, scales: Array, table: Array) -> "MatrixValues":
        """`codes` uint8 (rows, columns) index the 16 values of `table`; `scales` float32 (rows, columns / 32)."""
        return cls(np.asarray(table, np.float32)[codes], scales, levels=2, halves=2)

    def part(self, weight: Weight) -> "MatrixValues":
        """The rows and columns that a rank holds of it; vectors are matrices of one column."""
        rows, columns = slice(weight.rows.start, weight.rows.stop), slice(weight.columns.start, weight.columns.stop)
        blocks = weight.columns.blocks(BLOCK)
        values = self.values.reshape(weight.full_rows, weight.full_columns)[rows, columns]
        of_rows = slice(blocks.start * self.halves, blocks.stop * self.halves)
        scales = None if self.scales is None else self.scales[rows, of_rows]
        return replace(self, values=values, scales=scales)

    def floats(self, dtype: np.dtype[Any]) -> "MatrixValues":
        """The weights that these values stand for; value × scale is rounded to float32, as NF4 is defined."""
        if self.scales is None:
            return MatrixValues(self.values.astype(dtype))
        scales = np.repeat(self.scales, BLOCK // self.halves, axis=1)[:, : self.values.shape[1]]
        return MatrixValues((self.values.astype(np.float32) * scales).astype(dtype))

    def divided(self, by: Array) -> "MatrixValues":
        """Each row divided by a number, `by` (rows, 1)."""
        if self.scales is None:
            return MatrixValues((self.values.astype(np.float64) / by).astype(np.float32))
        return replace(self, scales=(self.scales / by).astype(np.float32))

    @cached_property
    def steps(self) -> Array:
        """(rows, columns) float32 whole numbers: the values as the 8-bit arithmetic multiplies them."""
        steps: Array = np.rint(self.values.astype(np.float32) * np.float32(self.levels))
        return steps

    @cached_property
    def step_scales(self) -> Array:
        """(rows, blocks) float32: the weight that one step stands for."""
        assert self.scales is not None
        return self.scales.astype(np.float32) / np.float32(self.levels)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """weight * x / sqrt(mean(x^2) + eps)"""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + x.dtype.type(eps))
    return weight * normed


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), written so that no exponential overflows."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def silu(x: Array) -> Array:
    """x * sigmoid(x)"""
    return x * sigmoid(x)


def attend_experts(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T) v of each token, its experts being heads of one dimension: (tokens, experts)."""
    scores = q[:, :, None] * k[:, None, :]
    e = np.exp(scores - scores.max(axis=2, keepdims=True))
    attended: Array = (e * v[:, None, :]).sum(axis=2) / e.sum(axis=2)
    return attended


def choose(scores: Array, route: Route, bias: Array | float = 0.0) -> Array:
    """(tokens, 2 * top): the experts with the largest p + bias, level ones by number, and their weights.

    p = softmax(scores) or sigmoid(scores); softmax keeps the order of scores, so these are compared, which is exact.
    That all chosen p are 0 makes no division by 0.
    """
    if route.scoring is Scoring.SOFTMAX:
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        compared = scores if route.correction is None else p / p.sum(axis=1, keepdims=True) + bias
    else:
        p = sigmoid(scores)
        compared = p + bias
    if route.groups > 1:
        grouped = compared.reshape(len(scores), route.groups, -1)
        best = -np.sort(-grouped, axis=2)[:, :, : route.group_best].sum(axis=2)
        kept = np.argsort(-best, axis=1, kind="stable")[:, : route.top_groups]
        outside = np.ones((len(scores), route.groups, 1), bool)
        np.put_along_axis(outside, kept[:, :, None], False, axis=1)
        compared = np.where(outside, -np.inf, grouped).reshape(scores.shape)
    numbers = np.argsort(-compared, axis=1, kind="stable")[:, : route.top]
    weights = np.take_along_axis(p, numbers, axis=1)
    if route.normalised:
        weights = weights / (weights.sum(axis=1, keepdims=True) + scores.dtype.type(1e-20))
    elif route.scoring is Scoring.SOFTMAX:
        weights = weights / p.sum(axis=1, keepdims=True)
    return np.concatenate((numbers.astype(scores.dtype), weights * scores.dtype.type(route.factor)), axis=1)


def gelu_tanh(x: Array) -> Array:
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), written as x * sigmoid(2u)."""
    twice = x.dtype.type(np.sqrt(8 / np.pi)) * (x + x.dtype.type(0.044715) * x**3)
    e = np.exp(-np.abs(twice))
    gated: Array = x * np.where(twice >= 0, 1 / (1 + e), e / (1 + e))
    return gated


def clamped(gate: Array, up: Array, clamp: Clamp) -> Array:
    """(up + 1) * g * sigmoid(sharpness * g), g no more than the limit, up within it on both sides."""
    g, limit = np.minimum(gate, gate.dtype.type(clamp.limit)), gate.dtype.type(clamp.limit)
    out: Array = (np.clip(up, -limit, limit) + 1) * g * sigmoid(gate.dtype.type(clamp.sharpness) * g)
    return out


ACTIVATIONS = {Activation.SILU: silu, Activation.GELU_TANH: gelu_tanh}


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap); x where there is no cap."""
    capped: Array = x.dtype.type(cap) * np.tanh(x / x.dtype.type(cap)) if cap else x
    return capped


def quantise(x: Array) -> tuple[Array, Array]:
    """8-bit activations: whole numbers (tokens, blocks, 64) from -127 to 127 and what one of them is worth (tokens,
    blocks); a row's last block is filled up with zeros."""
    tokens, width = x.shape
    blocks = -(-width // BLOCK)
    x = np.pad(x, ((0, 0), (0, blocks * BLOCK - width))).reshape(tokens, blocks, BLOCK)
    top = np.abs(x).max(axis=2)
    # A block of zeros, or one so small that 127 / top overflows float32, counts as zero.
    inverse = np.divide(127, top, out=np.zeros_like(top), where=top > 1e-36)
    return np.rint(x * inverse[:, :, None]), np.where(inverse > 0, top / 127, 0).astype(x.dtype)


def round_to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16."""
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def round_rows(x: Array) -> Array:
    """x (..., dim) in steps of 1 / 127 of each row's largest element, as the cache of int8 holds keys and values."""
    top = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    inverse = np.divide(127, top, out=np.zeros_like(top), where=top > 1e-36)
    return np.where(inverse > 0, np.rint(x * inverse) * (top / 127), 0).astype(x.dtype)


ROUNDING: dict[str, Callable[[Array], Array]] = {
    "float32": lambda x: x,
    "bf16": round_to_bfloat16,
    "int8": round_rows,
}
"""What becomes of keys and values in the cache, by its format; float32 is the reference's dtype."""


def multiply(x: Array, matrix: MatrixValues) -> Array:
    """x @ matrix.T, (tokens, rows); through 8-bit activations where the matrix has scales."""
    if matrix.scales is None:
        return x @ matrix.values.T
    steps, worth = quantise(x)
    weight, weight_worth = matrix.steps, matrix.step_scales.astype(x.dtype)
    out = np.zeros((len(x), len(weight)), x.dtype)
    for start in range(0, steps.shape[1], SPAN):
        span = np.zeros_like(out)
        for block in range(start, min(start + SPAN, steps.shape[1])):
            columns = weight[:, block * BLOCK : (block + 1) * BLOCK].astype(x.dtype)
            for half in range(matrix.halves):
                part = slice(half * BLOCK // matrix.halves, (half + 1) * BLOCK // matrix.halves)
                # Sums of 64 products of two whole numbers up to 127 are exact in float32.
                product = steps[:, block, : columns.shape[1]][:, part] @ columns[:, part].T
                span += worth[:, block, None] * weight_worth[None, :, block * matrix.halves + half] * product
        out += span
    return out


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
    """x (tokens, heads, dim): the pairs of the first `rope.dim` dimensions turned, the others as they are."""
    pair, half = np.arange(rope.dim // 2), rope.dim // 2
    one, other = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + half)
    cos, sin = (table[:, None, :] for table in tables(rope, positions, x.dtype))
    out = x.copy()
    out[:, :, one] = x[:, :, one] * cos - x[:, :, other] * sin
    out[:, :, other] = x[:, :, other] * cos + x[:, :, one] * sin
    return out


def attend(
    q: Array, keys: Array, values: Array, scale: float, window: int = 0, cap: float = 0.0, slopes: Sequence[float] = (),
    sinks: Array | None = None,
) -> Array:  # fmt: skip
    """softmax(scale * q . K) V of one token: q (heads, dim), keys (positions, heads, dim), values (…, value_dim).

    Scores are held below a `cap`; then each head takes `slopes` times the distance from them. `sinks` (heads,) are one
    score more of each head, of a position that has no value.

    Each piece of 256 positions has its own maximum, sum and weighted sum; pieces are joined in order. Of a window only
    the last positions are seen; pieces begin where they always do.
    """
    seen = max(0, len(keys) - window) if window else 0
    top = np.full(len(q), -np.inf, q.dtype)
    total = np.zeros(len(q), q.dtype)
    out = np.zeros((len(q), values.shape[2]), q.dtype)
    for start in range(seen // PIECE * PIECE, len(keys), PIECE):
        piece = slice(max(start, seen), start + PIECE)
        k, v = keys[piece], values[piece]
        scores = soft_cap(np.einsum("hd,phd->hp", q, k) * q.dtype.type(scale), cap)
        if slopes:
            back = len(keys) - 1 - np.arange(len(keys), dtype=q.dtype)[piece]
            scores = scores - np.array(slopes, q.dtype)[:, None] * back
        piece_top = scores.max(axis=1)
        weights = np.exp(scores - piece_top[:, None])
        piece_total, piece_out = weights.sum(axis=1), np.einsum("hp,phd->hd", weights, v)
        joined = np.maximum(top, piece_top)
        old, new = np.exp(top - joined), np.exp(piece_top - joined)
        top, total = joined, total * old + piece_total * new
        out = out * old[:, None] + piece_out * new[:, None]
    if sinks is not None:
        joined = np.maximum(top, sinks)
        kept = np.exp(top - joined)
        out, total = out * kept[:, None], total * kept + np.exp(sinks - joined)
    return out / total[:, None]
