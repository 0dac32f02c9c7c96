"""The numpy reader of a program: the specification that every kernel is tested against.

It runs the programs of all ranks of a world side by side, operation by operation, each by its formula in
`formulas.py`: no threads, no messages, no speed. It fixes what is computed and in which order sums are joined where
that order is promised; a compiled kernel may fuse a multiply and an add, so equality is to rounding.

Two arithmetics. `exact`: activations, cache and sums are floats of the reference's dtype. `int8`: weights of 4 and 8
bits meet activations rounded to 8 bits, one scale for each token and block of 64, and the cache holds bfloat16, or
what it is told to hold.
It knows nothing of checkpoints and formats: weights arrive as arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from tpcpu.program.formulas import (
    ACTIVATIONS,
    ROUNDING,
    Array,
    MatrixValues,
    attend,
    attend_experts,
    choose,
    clamped,
    multiply,
    rms_norm,
    rotate,
    sigmoid,
    silu,
    soft_cap,
)
from tpcpu.program.operations import (
    Add,
    AllReduce,
    Attention,
    Buffer,
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
    ShortConv,
    Weight,
)

Arithmetic = Literal["exact", "int8"]

Weights = Callable[[Weight], MatrixValues | ArrayLike]
"""Gives a declared weight's tensor, whole: plain floats of any shape, or `MatrixValues`. It is asked by `Weight`,
not by name: a head tied to the embedding has the embedding's name and may still have a format of its own."""


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
        self.round_kv = ROUNDING[kv]
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
                out[:, own] = ACTIVATIONS[operation.activation](x[operation.activated]) * x[operation.linear]
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
