"""The vocabulary of a program: buffers, weights and the few operations over them.

A program is a flat list of these records for one rank. They say what is computed and which part of which tensor this
rank needs, never how; the readers (`reference`, `compiled`, `cost`, `tpcpu explain`) decide that for themselves.
Sizes are per token; the number of tokens is an argument of the run.
"""

import math
from dataclasses import dataclass
from enum import Enum

from tpcpu.parallel.partition import Range, Share
from tpcpu.program.rope import Rope

BLOCK = 64
"""Weights that share a scale, and the unit in which inputs are divided over ranks."""

PIECE = 256
"""Cache positions whose softmax is accumulated together; pieces are joined in order. It fixes the order of sums."""


class Scoring(Enum):
    """What an expert's score goes through: softmax over the experts, or 1 / (1 + e^-x) of each."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class Activation(Enum):
    """What a gate goes through: x * sigmoid(x), or GELU in its tanh form."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True)
class Clamp:
    """Of a gated unit: (up + 1) * g * sigmoid(sharpness * g), g no more than `limit`, up within it on both sides."""

    limit: float
    sharpness: float


class Kind(Enum):
    """What a weight is for, which decides how it may be stored."""

    MATRIX = "linear"
    CONV = "conv"
    VECTOR = "vector"
    EMBEDDING = "embedding"
    HEAD = "head"
    EXPERT = "expert"
    """A matrix of one of several experts, for which publishers have formats of their own."""
    ROUTER = "router"
    """A matrix whose products choose between experts: held in floats, so that the choice is that of the model."""

    @property
    def multiplies(self) -> bool:
        """Whether the quantiser turns it into 4 or 8 bits."""
        return self in (Kind.MATRIX, Kind.CONV, Kind.EXPERT)

    @property
    def is_packed(self) -> bool:
        """Whether it lies in memory as kernels multiply it."""
        return self not in (Kind.VECTOR, Kind.EMBEDDING)


Key = tuple[str, Kind, str]
"""What tells the weights of a program apart, the same on every rank."""


@dataclass(frozen=True)
class Weight:
    """The part of one stored tensor that a rank needs.

    The tensor is seen as a matrix of `full_rows` rows (its first dimension) and `full_columns` columns (all the
    others, flattened). `columns` covers whole blocks of 64; what it holds beyond the rank's own features meets zeros.
    """

    name: str
    kind: Kind
    full_shape: tuple[int, ...]
    rows: Range
    columns: Range
    section: str = ""
    """Which of the weights in a tensor that holds several, by rows: `q` of a packed q, k and v."""
    plus: float = 0.0
    """What is added to a vector as it is loaded: a norm that multiplies by 1 + weight has 1."""
    unit_rows: bool = False
    """Whether rows are divided by their length as they are loaded."""

    @property
    def key(self) -> Key:
        return self.name, self.kind, self.section

    @property
    def full_rows(self) -> int:
        return self.full_shape[0]

    @property
    def full_columns(self) -> int:
        return math.prod(self.full_shape[1:])

    @property
    def size(self) -> int:
        """Weights held by this rank."""
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True)
class Buffer:
    """Activations `(tokens, width)` float32. Only the columns `own` are written; the others stay zero."""

    name: str
    width: int
    own: Range


@dataclass(frozen=True)
class Heads:
    """Attention heads inside a buffer: head `h` of `count` fills `dim` columns from `first + h * step`."""

    buffer: Buffer
    count: int
    dim: int
    first: int
    step: int


@dataclass(frozen=True)
class Segment:
    """One weight of a `Linear`: its rows fill the columns of `out` from `column` on; `bias` has those rows."""

    weight: Weight
    bias: Weight | None
    out: Buffer
    column: int


@dataclass(frozen=True)
class Embed:
    """out = scale * weight[token]"""

    weight: Weight
    out: Buffer
    scale: float = 1.0


@dataclass(frozen=True)
class Add:
    """out = x + y + bias"""

    x: Buffer
    y: Buffer
    bias: Weight | None
    out: Buffer


@dataclass(frozen=True)
class RmsNorm:
    """out = weight * x / sqrt(mean(x^2) + eps)"""

    x: Buffer
    weight: Weight
    eps: float
    out: Buffer


@dataclass(frozen=True)
class Linear:
    """out[:, column : column + rows] = x @ weight[rows, columns].T + bias, segment by segment."""

    x: Buffer
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class LinearByHeads:
    """Each head times rows of its own of one weight: out_h = x_h @ w_h.T, or x_h @ w_h if `turned`.

    w_h are `rows` rows of those that this rank holds, from `first` + h * `step` on. Activations are never rounded: of
    what a token multiplies this is little, and a head's few features would be rounded for little gain.
    """

    x: Heads
    weight: Weight
    rows: int
    first: int
    step: int
    turned: bool
    out: Buffer
    """Head after head."""

    @property
    def dim(self) -> int:
        """Features of a head of the result."""
        return self.weight.full_columns if self.turned else self.rows


@dataclass(frozen=True)
class ShortConv:
    """out_t = weight[:, :, 0] @ x_(t-1) + weight[:, :, 1] @ x_t + bias; x before a sequence is zero.

    The taps are adjacent in memory, so the flattened weight multiplies the interleave of x_(t-1) and x_t
    (Yuan 2.0's localized filtering). `state` numbers the buffer of the cache that keeps x of the last token.
    """

    x: Buffer
    weight: Weight
    bias: Weight | None
    state: int
    out: Buffer


@dataclass(frozen=True)
class RopeAndStore:
    """Rotates q and k by their positions; writes q to `out` and appends k and v to the cache of `layer`.

    Before that each head of q and of k goes through an RmsNorm of its own, where there is a weight for it.

    Where there is no v, values are the first dimensions of the one key that all heads read, k; then what is rotated are
    `q_turned` and `k_turned`, which follow q and k in a row, and zeros fill it up to a multiple of 16: `latent_dim`.
    """

    q: Heads
    k: Heads
    v: Heads | None
    rope: Rope
    layer: int
    out: Buffer
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    eps: float = 0.0
    q_turned: Heads | None = None
    k_turned: Heads | None = None


@dataclass(frozen=True)
class Attention:
    """out_h = softmax(s) V, causal, over the cache of `layer`, where s = scale * q_h . K.

    Query head h reads key/value head `kv_of[h]` of those that this rank holds. A token sees itself and the
    `window` - 1 before it, or all where that is 0. With a `cap` s becomes cap * tanh(s / cap); with `slopes`, one a
    head, a position that is n back loses slope * n. With `sinks`, one a head, the softmax has one score more than there
    are positions, and what that one takes of the weights goes nowhere. Where the cache says so V is the first
    `value_dim` dimensions of K.
    """

    q: Buffer
    heads: int
    head_dim: int
    kv_of: tuple[int, ...]
    scale: float
    layer: int
    out: Buffer
    window: int = 0
    cap: float = 0.0
    slopes: tuple[float, ...] = ()
    sinks: Weight | None = None
    value_dim: int = 0
    """Of a value; 0: as of a key."""


@dataclass(frozen=True)
class Glu:
    """out[:, own] = activation(activated) * linear"""

    activated: Buffer
    linear: Buffer
    out: Buffer
    activation: Activation = Activation.SILU


@dataclass(frozen=True)
class GatedAdd:
    """out = x + sigmoid(gate) * y, where a token's gate is one number."""

    x: Buffer
    y: Buffer
    gate: Buffer
    out: Buffer


@dataclass(frozen=True)
class ExpertAttention:
    """out_i = sum over j of softmax_j(q_i * k_j) v_j, for the experts i and j of each token.

    Attention of experts to one another, each a head of one dimension: a router that sees how they go together
    (Yuan 2.0-M32).
    """

    q: Buffer
    k: Buffer
    v: Buffer
    out: Buffer


@dataclass(frozen=True)
class Route:
    """The `top` experts of each token: out = their numbers, then their weights, largest first.

    They have the largest c = p + `correction`, p = softmax(scores) or what else `scoring` says, of level ones the lower
    numbers; p are their weights, divided by the sum of the chosen ones if `normalised`, then times `factor`. With
    `groups`, of as many neighbours each, only experts of the `top_groups` best ones are chosen: those with the largest
    sums of their `group_best` largest c.
    """

    scores: Buffer
    top: int
    normalised: bool
    out: Buffer
    scoring: Scoring = Scoring.SOFTMAX
    correction: Weight | None = None
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    factor: float = 1.0


@dataclass(frozen=True)
class Expert:
    """One expert's matrices, each a tensor of its own, and their biases, where there are any.

    What `down` gives is added up over the ranks: its bias is the first one's, and has no rows on the others.
    """

    gate: Weight
    up: Weight
    down: Weight
    gate_bias: Weight | None = None
    up_bias: Weight | None = None
    down_bias: Weight | None = None

    @property
    def matrices(self) -> tuple[Weight, Weight, Weight]:
        return self.gate, self.up, self.down

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices, then the biases."""
        biases = self.gate_bias, self.up_bias, self.down_bias
        return (*self.matrices, *(bias for bias in biases if bias is not None))


@dataclass(frozen=True)
class Experts:
    """out = sum over the experts that `choice` names: weight * down @ (silu(gate @ x) * (up @ x)), in that order.

    Products have their biases added; a `clamp` takes the place of silu. `choice` is what a `Route` wrote. `inner` has
    the shape of what `down` multiplies, for one expert of one token.
    """

    x: Buffer
    choice: Buffer
    experts: tuple[Expert, ...]
    inner: Buffer
    out: Buffer
    clamp: Clamp | None = None

    @property
    def top(self) -> int:
        """How many experts a token has."""
        return self.choice.width // 2


@dataclass(frozen=True)
class AllReduce:
    """out = the sum of x over all ranks, the same bits on each."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True)
class Logits:
    """out = x @ weight.T for the tokens whose logits are wanted, over this rank's rows of the vocabulary.

    With a `cap` it becomes cap * tanh(out / cap).
    """

    x: Buffer
    weight: Weight
    out: Buffer
    cap: float = 0.0


Operation = (
    Embed | Add | GatedAdd | RmsNorm | Linear | LinearByHeads | ShortConv | RopeAndStore | Attention | Glu
    | ExpertAttention | Route | Experts | AllReduce | Logits
)  # fmt: skip


def inputs(operation: Operation) -> tuple[Buffer, ...]:
    """The buffers that an operation reads, in the order of its formula."""
    match operation:
        case Embed():
            return ()
        case Add():
            return (operation.x, operation.y)
        case RopeAndStore():
            each = (operation.q, operation.k, operation.v, operation.q_turned, operation.k_turned)
            return tuple(dict.fromkeys(heads.buffer for heads in each if heads is not None))
        case LinearByHeads():
            return (operation.x.buffer,)
        case Attention():
            return (operation.q,)
        case Glu():
            return (operation.activated, operation.linear)
        case GatedAdd():
            return (operation.x, operation.y, operation.gate)
        case ExpertAttention():
            return (operation.q, operation.k, operation.v)
        case Route():
            return (operation.scores,)
        case Experts():
            return (operation.x, operation.choice)
        case _:
            return (operation.x,)


def outputs(operation: Operation) -> tuple[Buffer, ...]:
    """The buffers that an operation writes."""
    if isinstance(operation, Linear):
        return tuple(dict.fromkeys(segment.out for segment in operation.segments))
    return (operation.out,)


def weights(operation: Operation) -> tuple[Weight, ...]:
    """The weights that an operation reads, each before its bias."""
    match operation:
        case Linear():
            pairs = [(segment.weight, segment.bias) for segment in operation.segments]
            return tuple(weight for pair in pairs for weight in pair if weight is not None)
        case Embed() | RmsNorm() | Logits() | LinearByHeads():
            return (operation.weight,)
        case Route():
            return () if operation.correction is None else (operation.correction,)
        case RopeAndStore():
            return tuple(norm for norm in (operation.q_norm, operation.k_norm) if norm is not None)
        case ShortConv():
            return (operation.weight,) if operation.bias is None else (operation.weight, operation.bias)
        case Add():
            return () if operation.bias is None else (operation.bias,)
        case Attention():
            return () if operation.sinks is None else (operation.sinks,)
        case Experts():
            return tuple(weight for expert in operation.experts for weight in expert.weights)
        case _:
            return ()


def weights_of_token(operation: Operation) -> tuple[Weight, ...]:
    """Those of them that one token needs: of experts as many as it chooses, of which the first stand for all."""
    if isinstance(operation, Experts):
        return tuple(weight for expert in operation.experts[: operation.top] for weight in expert.weights)
    return weights(operation)


@dataclass(frozen=True)
class KvShape:
    """The key/value cache of one layer on this rank."""

    heads: int
    head_dim: int
    shared: bool = False
    """Whether values are the first dimensions of keys, and lie nowhere else."""

    @property
    def rows(self) -> int:
        """Rows of `head_dim` that a head has for each position: a key, and a value where it is no part of that."""
        return 1 if self.shared else 2


LATENT_UNIT = 16
"""Where values lie in keys, a row of the cache has a multiple of so many dimensions."""


def latent_dim(dim: int) -> int:
    """A row of the cache in which values lie in keys of `dim` dimensions."""
    return -(-dim // LATENT_UNIT) * LATENT_UNIT


@dataclass(frozen=True)
class Program:
    """What one rank computes for a batch of tokens.

    `weights` lists every declared weight once, in order of first use; `kv` and `states` say what a sequence's
    cache holds: key/value heads per layer, and widths of the convolutions' inputs.
    """

    share: Share
    operations: tuple[Operation, ...]
    buffers: tuple[Buffer, ...]
    weights: tuple[Weight, ...]
    kv: tuple[KvShape, ...]
    states: tuple[int, ...]
    layer_of: tuple[int, ...]
    """For each operation the model's layer that it belongs to, -1 outside the layers."""
