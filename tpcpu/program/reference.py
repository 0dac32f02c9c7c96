"""The numpy reader of a program: the specification that every kernel is tested against.

It runs the programs of all ranks of a world side by side, operation by operation, and reads like the formulas in a
paper: float32 or float64, no threads, no messages, no speed. It fixes what is computed and in which order sums are
joined where that order is promised; a compiled kernel may fuse a multiply and an add, so equality is to rounding.

Two arithmetics. `exact`: activations, cache and sums are floats of the reference's dtype. `int8`: weights of 4 and 8
bits meet activations rounded to 8 bits, one scale for each token and block of 64, and the cache holds bfloat16, or
what it is told to hold.
It knows nothing of checkpoints and formats: weights arrive as arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tpcpu.program.operations import (
    BLOCK,
    PIECE,
    Activation,
    Add,
    AllReduce,
    Attention,
    Buffer,
    Clamp,
    Embed,
    ExpertAttention,
    Experts,
    GatedAdd,
    Glu,
    Heads,
    Key,
    Linear,
    LinearByHeads,
    Logits,
    Operation,
    Program,
    RmsNorm,
    RopeAndStore,
    Route,
    Scoring,
    ShortConv,
    Weight,
)
from tpcpu.program.rope import Rope, tables

Array = NDArray[Any]
Arithmetic = Literal["exact", "int8"]

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


Weights = Callable[[Weight], MatrixValues | ArrayLike]
"""Gives a declared weight's tensor, whole: plain floats of any shape, or `MatrixValues`. It is asked by `Weight`,
not by name: a head tied to the embedding has the embedding's name and may still have a format of its own."""


# The formulas. x is (tokens, width) everywhere.


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


_ACTIVATIONS = {Activation.SILU: silu, Activation.GELU_TANH: gelu_tanh}


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


_ROUNDING: dict[str, Callable[[Array], Array]] = {
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


@dataclass(frozen=True)
class Batch:
    """Tokens of one or more sequences; those of one sequence stand together and in order. All int (tokens,)."""

    tokens: Array
    positions: Array
    sequences: Array
    wanted: Array

    def continues(self, token: int) -> bool:
        """Whether the token before it in the batch is the one before it in its sequence."""
        return token > 0 and bool(self.sequences[token - 1] == self.sequences[token])

    def ends(self, token: int) -> bool:
        """Whether it is the last of its sequence in the batch."""
        return token + 1 == len(self.tokens) or not self.continues(token + 1)


class _Rank:
    """One rank's weights, caches and, during a step, its buffers."""

    def __init__(
        self, program: Program, weights: Weights, dtype: np.dtype[Any], arithmetic: Arithmetic, context: int, kv: str
    ) -> None:
        self.round_kv = _ROUNDING[kv]
        self.program = program
        self.dtype = dtype
        self.context = context
        self.rounds = arithmetic == "int8"
        self.weights: dict[Key, MatrixValues] = {weight.key: self._load(weight, weights) for weight in program.weights}
        self.buffers: dict[Buffer, Array] = {}
        self._cache: dict[tuple[int, int], Array] = {}
        """By layer and sequence: keys and values, (2, context, kv_heads, head_dim)."""
        self._state: dict[tuple[int, int], Array] = {}
        """By state and sequence: x of the sequence's last token."""

    def _load(self, weight: Weight, weights: Weights) -> MatrixValues:
        given = weights(weight)
        whole = given if isinstance(given, MatrixValues) else MatrixValues(np.asarray(given))
        part = whole.part(weight)
        if weight.unit_rows:
            lengths = np.linalg.norm(part.floats(np.dtype(np.float64)).values, axis=1, keepdims=True)
            part = part.divided(np.maximum(lengths, 1e-12))
        if weight.plus:
            part = MatrixValues(part.floats(self.dtype).values + self.dtype.type(weight.plus))
        return part if self.rounds and part.scales is not None else part.floats(self.dtype)

    def matrix(self, weight: Weight) -> MatrixValues:
        return self.weights[weight.key]

    def vector(self, weight: Weight | None) -> Array | float:
        return 0.0 if weight is None else self.matrix(weight).values[:, 0]

    def zeros(self, buffer: Buffer, tokens: int) -> Array:
        """A buffer before anything is written to it; what an operation does not write stays zero."""
        self.buffers[buffer] = np.zeros((tokens, buffer.width), self.dtype)
        return self.buffers[buffer]

    def heads(self, heads: Heads) -> Array:
        """(tokens, count, dim) of the buffer that holds them."""
        columns = heads.first + heads.step * np.arange(heads.count)[:, None] + np.arange(heads.dim)
        return self.buffers[heads.buffer][:, columns]

    def normed(self, heads: Array, weight: Weight | None, eps: float) -> Array:
        """(tokens, count, dim), each head behind a norm of its own where there is a weight for it."""
        if weight is None:
            return heads
        flat = rms_norm(heads.reshape(-1, heads.shape[2]), np.asarray(self.vector(weight)), eps)
        return flat.reshape(heads.shape)

    def cache(self, layer: int, sequence: int) -> Array:
        if (layer, sequence) not in self._cache:
            shape = self.program.kv[layer]
            self._cache[layer, sequence] = np.zeros((2, self.context, shape.heads, shape.head_dim), self.dtype)
        return self._cache[layer, sequence]

    def forget(self, sequence: int) -> None:
        for held in (self._cache, self._state):
            for key in [key for key in held if key[1] == sequence]:
                del held[key]

    def run(self, operation: Operation, batch: Batch) -> None:
        """Any operation but the all-reduce, which needs every rank."""
        x = self.buffers
        out = self.zeros(operation.out, len(batch.tokens)) if not isinstance(operation, Linear) else np.empty(0)
        match operation:
            case Embed(weight=weight):
                out[:] = self.dtype.type(operation.scale) * self.matrix(weight).values[batch.tokens]
            case Add():
                out[:] = x[operation.x] + x[operation.y] + self.vector(operation.bias)
            case RmsNorm():
                out[:] = rms_norm(x[operation.x], np.asarray(self.vector(operation.weight)), operation.eps)
            case Linear(segments=segments):
                for buffer in dict.fromkeys(segment.out for segment in segments):
                    self.zeros(buffer, len(batch.tokens))
                for segment in segments:
                    product = multiply(x[operation.x], self.matrix(segment.weight)) + self.vector(segment.bias)
                    x[segment.out][:, segment.column : segment.column + product.shape[1]] = product
            case LinearByHeads():
                own = slice(operation.out.own.start, operation.out.own.stop)
                out[:, own] = self.by_heads(operation).reshape(len(out), -1)
            case ShortConv():
                own = slice(operation.out.own.start, operation.out.own.stop)
                taps = np.stack((self.previous(x[operation.x], operation.state, batch), x[operation.x]), axis=2)
                product = multiply(taps.reshape(len(out), -1), self.matrix(operation.weight))
                out[:, own] = product + self.vector(operation.bias)
            case RopeAndStore(layer=layer, q_turned=Heads() as q_turned, k_turned=Heads() as k_turned):
                out[:] = self.latent(operation.q, q_turned, operation, batch).reshape(out.shape)
                k = self.latent(operation.k, k_turned, operation, batch)
                self.store(layer, k, k, batch)
            case RopeAndStore(layer=layer, v=Heads() as values):
                q = self.normed(self.heads(operation.q), operation.q_norm, operation.eps)
                k, v = self.normed(self.heads(operation.k), operation.k_norm, operation.eps), self.heads(values)
                out[:] = rotate(q, batch.positions, operation.rope).reshape(out.shape)
                self.store(layer, rotate(k, batch.positions, operation.rope), v, batch)
            case Attention():
                own = slice(operation.out.own.start, operation.out.own.stop)
                q = x[operation.q].reshape(len(out), operation.heads, operation.head_dim)
                sinks = None if operation.sinks is None else np.asarray(self.vector(operation.sinks))
                for token, (position, sequence) in enumerate(zip(batch.positions, batch.sequences, strict=True)):
                    # Query head h reads key/value head kv_of[h]; causal: positions up to its own.
                    keys, values = self.cache(operation.layer, sequence)[:, : position + 1, list(operation.kv_of)]
                    out[token, own] = attend(
                        q[token], keys, values[:, :, : operation.value_dim or None], operation.scale,
                        operation.window, operation.cap, operation.slopes, sinks,
                    ).ravel()  # fmt: skip
            case Glu():
                own = slice(operation.out.own.start, operation.out.own.stop)
                out[:, own] = _ACTIVATIONS[operation.activation](x[operation.activated]) * x[operation.linear]
            case GatedAdd():
                out[:] = x[operation.x] + sigmoid(x[operation.gate]) * x[operation.y]
            case ExpertAttention():
                out[:] = attend_experts(x[operation.q], x[operation.k], x[operation.v])
            case Route():
                out[:] = choose(x[operation.scores], operation, self.vector(operation.correction))
            case Experts():
                out[:] = self.mixture(operation)
            case Logits():
                product = multiply(x[operation.x][batch.wanted], self.matrix(operation.weight))
                x[operation.out] = soft_cap(product, operation.cap)
            case AllReduce():
                raise AssertionError("an all-reduce needs every rank")

    def by_heads(self, op: LinearByHeads) -> Array:
        """(tokens, heads, dim): each head times its rows of the weight."""
        matrix = self.matrix(op.weight).floats(self.dtype).values
        first = op.first + op.step * np.arange(op.x.count)
        rows = matrix[first[:, None] + np.arange(op.rows)]
        product: Array = np.einsum("thr,hrc->thc" if op.turned else "thc,hrc->thr", self.heads(op.x), rows)
        return product

    def latent(self, plain: Heads, turned: Heads, op: RopeAndStore, batch: Batch) -> Array:
        """(tokens, count, dim of the cache): what is not rotated, what is, zeros."""
        rotated = rotate(self.heads(turned), batch.positions, op.rope)
        row = np.concatenate((self.heads(plain), rotated), axis=2)
        rest = self.program.kv[op.layer].head_dim - row.shape[2]
        return np.pad(row, ((0, 0), (0, 0), (0, rest)))

    def mixture(self, op: Experts) -> Array:
        """Every expert for the tokens that chose it; of each token the results are added in the order of its choice."""
        x, choice = self.buffers[op.x], self.buffers[op.choice]
        numbers, weights = choice[:, : op.top].astype(int), choice[:, op.top :]
        each = np.zeros((*numbers.shape, op.out.width), self.dtype)
        own = slice(op.inner.own.start, op.inner.own.stop)
        for number, expert in enumerate(op.experts):
            tokens, places = np.nonzero(numbers == number)
            if not len(tokens):
                continue
            inner = np.zeros((len(tokens), op.inner.width), self.dtype)
            gate = multiply(x[tokens], self.matrix(expert.gate)) + self.vector(expert.gate_bias)
            up = multiply(x[tokens], self.matrix(expert.up)) + self.vector(expert.up_bias)
            inner[:, own] = silu(gate) * up if op.clamp is None else clamped(gate, up, op.clamp)
            each[tokens, places] = multiply(inner, self.matrix(expert.down))
            if expert.down_bias is not None and expert.down_bias.size:
                each[tokens, places] += self.vector(expert.down_bias)
        out = np.zeros((len(x), op.out.width), self.dtype)
        for place in range(op.top):
            out += weights[:, place, None] * each[:, place]
        return out

    def previous(self, x: Array, state: int, batch: Batch) -> Array:
        """x of the token before each: from the batch, from the state, or zero at position 0. Renews the state."""
        before = np.zeros_like(x)
        for token, (position, sequence) in enumerate(zip(batch.positions, batch.sequences, strict=True)):
            if position:
                before[token] = x[token - 1] if batch.continues(token) else self._state[state, sequence]
        for token, sequence in enumerate(batch.sequences):
            if batch.ends(token):
                self._state[state, sequence] = x[token].copy()
        return before

    def store(self, layer: int, k: Array, v: Array, batch: Batch) -> None:
        """Keys and values of the batch into the cache, rounded to its format."""
        pair = self.round_kv(np.stack((k, v)))
        for token, (position, sequence) in enumerate(zip(batch.positions, batch.sequences, strict=True)):
            self.cache(layer, sequence)[:, position] = pair[:, token]


class Reference:
    """Runs the programs of all ranks in lockstep, in plain numpy.

    programs: one for each rank, in rank order. weights: see `Weights`; asked once for every weight of every rank.
    dtype: of activations, sums and exact weights. context: positions that the cache of a sequence has room for.
    kv: the format of keys and values, float32, bf16 or int8; the arithmetic's own if None.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        weights: Weights,
        *,
        dtype: Any = np.float32,
        arithmetic: Arithmetic = "exact",
        context: int = 512,
        kv: str | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.context = context
        kv = kv or ("float32" if arithmetic == "exact" else "bf16")
        self.ranks = [_Rank(program, weights, self.dtype, arithmetic, context, kv) for program in programs]

    def run(self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike, wanted: ArrayLike) -> Array:
        """One step over a flat batch; gives the logits `(wanted, vocab)` of the tokens with the indices `wanted`.

        All arguments are integers, (tokens,) but `wanted`. A sequence's number names its cache; its tokens stand
        together and in order, and go on where the last step ended, or start anew from position 0.
        """
        batch = Batch(*(np.asarray(array, np.int64) for array in (tokens, positions, sequences, wanted)))
        if len(batch.tokens) and not 0 <= batch.positions.min() <= batch.positions.max() < self.context:
            raise ValueError(f"positions up to {batch.positions.max()} do not fit a context of {self.context}")
        logits = self.trace(batch)
        for rank in self.ranks:
            rank.buffers.clear()
        return logits

    def trace(self, batch: Batch) -> Array:
        """As `run`, and leaves every buffer of every rank, `ranks[r].buffers[buffer]`, for tests of single kernels."""
        for operations in zip(*(rank.program.operations for rank in self.ranks), strict=True):
            if isinstance(operations[0], AllReduce):
                self._all_reduce(operations)
            else:
                for rank, operation in zip(self.ranks, operations, strict=True):
                    rank.run(operation, batch)
        heads = [rank.program.operations[-1] for rank in self.ranks]
        return np.concatenate(
            [rank.buffers[head.out] for rank, head in zip(self.ranks, heads, strict=True) if isinstance(head, Logits)],
            axis=1,
        )

    def forget(self, sequence: int) -> None:
        """Drops a sequence's cache and states."""
        for rank in self.ranks:
            rank.forget(sequence)

    def _all_reduce(self, operations: Sequence[Operation]) -> None:
        """The parts are added in rank order, so that every rank gets the same bits."""
        reduces = [operation for operation in operations if isinstance(operation, AllReduce)]
        total = self.ranks[0].buffers[reduces[0].x].copy()
        for rank, reduce in list(zip(self.ranks, reduces, strict=True))[1:]:
            total += rank.buffers[reduce.x]
        for rank, reduce in zip(self.ranks, reduces, strict=True):
            rank.buffers[reduce.out] = total.copy()
