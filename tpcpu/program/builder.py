"""Builds a program operation by operation: the language that architecture files are written in.

Knows how a division of features becomes rows and columns of weights, and gives every result a buffer of its own.
Needs no memory, no kernels and no checkpoint: weights are declared here and bound later.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tpcpu.parallel.partition import Range, Share
from tpcpu.program.operations import (
    BLOCK,
    Activation,
    Add,
    AllReduce,
    Attention,
    Buffer,
    Clamp,
    Embed,
    Expert,
    ExpertAttention,
    Experts,
    GatedAdd,
    Glu,
    Heads,
    Key,
    Kind,
    KvShape,
    Linear,
    LinearByHeads,
    Logits,
    Operation,
    Program,
    RmsNorm,
    RopeAndStore,
    Route,
    Scoring,
    Segment,
    ShortConv,
    Weight,
    latent_dim,
)
from tpcpu.program.rope import Rope


class Matrix(NamedTuple):
    """A weight and, where the module has one, the bias of its rows."""

    weight: Weight
    bias: Weight | None


class Builder:
    """Collects the operations of one rank; `finish` gives the program."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.layer = -1
        """The layer that the next operations belong to, -1 outside the layers."""
        self._operations: list[Operation] = []
        self._layer_of: list[int] = []
        self._buffers: list[Buffer] = []
        self._weights: dict[Key, Weight] = {}
        self._kv: list[KvShape] = []
        self._states: list[int] = []

    # Weights. `full` is (out, in, ...) as stored; a rank multiplies `rows` and `columns` of it, all by default.

    def vector(
        self, name: str, full: int, rows: Range | None = None, *, section: str = "", plus: float = 0.0
    ) -> Weight:
        """A norm's weight or a bias, `(full,)`."""
        rows = Range(0, full) if rows is None else rows
        return self._declare(Weight(name, Kind.VECTOR, (full,), rows, Range(0, 1), section, plus))

    def matrix(
        self, module: str, full: tuple[int, ...], *, rows: Range | None = None, columns: Range | None = None,
        bias: bool = False, kind: Kind = Kind.MATRIX, section: str = "", unit_rows: bool = False,
    ) -> Matrix:  # fmt: skip
        """The `weight`, and the `bias` of its rows, of a module. Columns are widened to whole blocks: see `Weight`."""
        full_columns = math.prod(full[1:])
        rows = Range(0, full[0]) if rows is None else rows
        columns = Range(0, full_columns) if columns is None else columns.cover(BLOCK, full_columns)
        weight = self._declare(Weight(f"{module}.weight", kind, full, rows, columns, section, unit_rows=unit_rows))
        return Matrix(weight, self.vector(f"{module}.bias", full[0], rows, section=section) if bias else None)

    # Operations

    def embed(self, module: str, vocab: int, hidden: int, scale: float = 1.0) -> Buffer:
        weight = self.matrix(module, (vocab, hidden), kind=Kind.EMBEDDING).weight
        out = self._buffer("hidden", hidden)
        self._emit(Embed(weight, out, scale))
        return out

    def add(self, x: Buffer, y: Buffer, bias: Weight | None = None) -> Buffer:
        out = self._buffer("hidden", x.width)
        self._emit(Add(x, y, bias, out))
        return out

    def rms_norm(self, x: Buffer, module: str, eps: float, *, plus: float = 0.0) -> Buffer:
        """`plus` is added to the stored weight."""
        out = self._buffer("norm", x.width)
        self._emit(RmsNorm(x, self.vector(f"{module}.weight", x.width, plus=plus), eps, out))
        return out

    def linear(self, x: Buffer, **outputs: Matrix | Sequence[Matrix]) -> tuple[Buffer, ...]:
        """Each output is one matrix, or several stacked by rows; all of them multiply the same `x`."""
        segments: list[Segment] = []
        outs: list[Buffer] = []
        for name, matrices in outputs.items():
            stack = [matrices] if isinstance(matrices, Matrix) else matrices
            out = self._buffer(name, sum(len(matrix.weight.rows) for matrix in stack))
            column = 0
            for weight, bias in stack:
                assert len(weight.columns) == x.width, (weight, x)
                segments.append(Segment(weight, bias, out, column))
                column += len(weight.rows)
            outs.append(out)
        self._emit(Linear(x, tuple(segments)))
        return tuple(outs)

    def linear_by_heads(
        self, x: Heads, weight: Weight, rows: int, first: int, step: int, *, turned: bool = False,
        covering: tuple[Range, int] | None = None,
    ) -> Buffer:  # fmt: skip
        """See `LinearByHeads`. `covering` = (this rank's heads, all heads) when the consumer's inputs are divided."""
        dim = weight.full_columns if turned else rows
        assert x.dim == (rows if turned else weight.full_columns), (x, weight)
        if covering:
            out = self._covering("by_heads", covering[0] * dim, covering[1] * dim, BLOCK)
        else:
            out = self._buffer("by_heads", x.count * dim)
        self._emit(LinearByHeads(x, weight, rows, first, step, turned, out))
        return out

    def short_conv(self, x: Buffer, matrix: Matrix, covering: tuple[Range, int] | None = None) -> Buffer:
        """`covering` = (this rank's channels, all channels) when the consumer's inputs are divided by them."""
        assert len(matrix.weight.columns) == 2 * x.width, (matrix.weight, x)
        self._states.append(x.width)
        # A block of the next convolution is 32 channels of 2 taps.
        out = (
            self._covering("conv", *covering, BLOCK // 2) if covering else self._buffer("conv", len(matrix.weight.rows))
        )
        self._emit(ShortConv(x, matrix.weight, matrix.bias, len(self._states) - 1, out))
        return out

    def rope_and_store(
        self, q: Heads, k: Heads, v: Heads, rope: Rope, norms: Sequence[Weight] = (), eps: float = 0.0
    ) -> Buffer:
        """The rotated queries, head after head; keys and values go to the next layer of the cache.

        `norms` of each head of q and of k, or none.
        """
        self._kv.append(KvShape(k.count, k.dim))
        out = self._buffer("query", q.count * q.dim)
        q_norm, k_norm = norms or (None, None)
        self._emit(RopeAndStore(q, k, v, rope, len(self._kv) - 1, out, q_norm, k_norm, eps))
        return out

    def rope_and_store_latent(self, q: Heads, q_turned: Heads, k: Heads, k_turned: Heads, rope: Rope) -> Buffer:
        """Queries as the next layer of the cache has its one key: what is not rotated, which is the value, then what
        is; see `RopeAndStore`."""
        assert k.count == k_turned.count == 1
        dim = latent_dim(k.dim + k_turned.dim)
        self._kv.append(KvShape(1, dim, shared=True))
        out = self._buffer("query", q.count * dim)
        layer = len(self._kv) - 1
        self._emit(RopeAndStore(q, k, None, rope, layer, out, q_turned=q_turned, k_turned=k_turned))
        return out

    def attention(
        self, q: Buffer, heads: Range, full_heads: int, kv_of: Sequence[int], scale: float, window: int = 0,
        *, cap: float = 0.0, slopes: Sequence[float] = (), sinks: Weight | None = None, value_dim: int = 0,
    ) -> Buffer:  # fmt: skip
        """Attends over the cache that `rope_and_store` filled last; `heads` are this rank's of `full_heads`.

        `value_dim`: of values that lie in keys.
        """
        layer = len(self._kv) - 1
        dim = self._kv[layer].head_dim
        wide = value_dim or dim
        out = self._covering("attention", heads * wide, full_heads * wide, BLOCK)
        self._emit(
            Attention(q, len(heads), dim, tuple(kv_of), scale, layer, out, window, cap, tuple(slopes), sinks, value_dim)
        )
        return out

    def glu(
        self, activated: Buffer, linear: Buffer, features: Range, full_features: int,
        activation: Activation = Activation.SILU,
    ) -> Buffer:  # fmt: skip
        """`features` are this rank's of `full_features`."""
        out = self._covering("glu", features, full_features, BLOCK)
        self._emit(Glu(activated, linear, out, activation))
        return out

    def gated_add(self, x: Buffer, y: Buffer, gate: Buffer) -> Buffer:
        """Adds to x what a token's gate, a buffer of one column, lets through of y."""
        out = self._buffer("hidden", x.width)
        self._emit(GatedAdd(x, y, gate, out))
        return out

    def expert_attention(self, q: Buffer, k: Buffer, v: Buffer) -> Buffer:
        """Scores of experts, each of which attends to all; q, k and v have a column for each."""
        assert q.width == k.width == v.width, (q, k, v)
        out = self._buffer("scores", q.width)
        self._emit(ExpertAttention(q, k, v, out))
        return out

    def experts(
        self, x: Buffer, scores: Buffer, top: int, experts: Sequence[Expert], features: Range, full_features: int, *,
        normalised: bool, clamp: Clamp | None = None, scoring: Scoring = Scoring.SOFTMAX,
        correction: Weight | None = None, groups: tuple[int, int, int] = (1, 1, 1), factor: float = 1.0,
    ) -> Buffer:  # fmt: skip
        """The sum of each token's `top` experts by its scores; `features` are this rank's of each expert's.

        How they are chosen: see `Route`; `groups` = (how many, how many of them, of how many experts).
        """
        choice = self._buffer("choice", 2 * top)
        self._emit(Route(scores, top, normalised, choice, scoring, correction, *groups, factor))
        inner = self._covering("expert", features, full_features, BLOCK)
        out = self._buffer("experts", experts[0].down.full_rows)
        self._emit(Experts(x, choice, tuple(experts), inner, out, clamp))
        return out

    def expert(
        self, modules: tuple[str, str, str], hidden: int, features: Range, full_features: int, *, bias: bool = False
    ) -> Expert:
        """The matrices of one expert, gate, up and down, divided over its inner features; `bias`: with their biases."""
        full, kind = (full_features, hidden), Kind.EXPERT
        gate, up = (self.matrix(name, full, rows=features, bias=bias, kind=kind) for name in modules[:2])
        down = self.matrix(modules[2], full[::-1], columns=features, kind=kind).weight
        once = Range(0, hidden if self.share.rank == 0 else 0)
        down_bias = self.vector(f"{modules[2]}.bias", hidden, once) if bias else None
        return Expert(gate.weight, up.weight, down, gate.bias, up.bias, down_bias)

    def all_reduce(self, x: Buffer) -> Buffer:
        out = self._buffer("sum", x.width)
        self._emit(AllReduce(x, out))
        return out

    def logits(self, x: Buffer, module: str, vocab: int, *, cap: float = 0.0, unit_rows: bool = False) -> Buffer:
        """The head is divided over the vocabulary; `module` may be the embedding's, when they are tied."""
        rows = self.share.split(vocab)
        weight = self.matrix(module, (vocab, x.width), rows=rows, kind=Kind.HEAD, unit_rows=unit_rows).weight
        out = self._buffer("logits", len(rows))
        self._emit(Logits(x, weight, out, cap))
        return out

    def finish(self) -> Program:
        return Program(
            self.share,
            tuple(self._operations),
            tuple(self._buffers),
            tuple(self._weights.values()),
            tuple(self._kv),
            tuple(self._states),
            tuple(self._layer_of),
        )

    def _declare(self, weight: Weight) -> Weight:
        held = self._weights.setdefault(weight.key, weight)
        assert held is weight or held == weight, f"{weight.name} is divided in two ways"
        return held

    def _buffer(self, name: str, width: int, own: Range | None = None) -> Buffer:
        buffer = Buffer(f"{name}.{len(self._buffers)}", width, Range(0, width) if own is None else own)
        self._buffers.append(buffer)
        return buffer

    def _covering(self, name: str, features: Range, full: int, unit: int) -> Buffer:
        """A buffer of the whole units that hold `features`: what an input-split weight's blocks multiply."""
        cover = features.cover(unit, full)
        start = features.start - cover.start
        return self._buffer(name, len(cover), Range(start, start + len(features)) if len(features) else Range(0, 0))

    def _emit(self, operation: Operation) -> None:
        self._operations.append(operation)
        self._layer_of.append(self.layer)
