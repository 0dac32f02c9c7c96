"""Adds up a program: bytes, arithmetic, messages and waits, operation by operation and rank by rank.

It is where the bytes of every plan and every speed figure come from. Counts what is at rest in memory and read for a
step; knows no machine, no time, and reads no weights. Not counted, as they vanish beside the weights: NF4's offset
and tables, one set for each tensor, and rows that a kernel adds to fill a share's last panel.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import mode

from tpcpu.kernels.record import HALVES, RING, SPAN
from tpcpu.parallel.partition import Range, Share
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.program.lowering import Joining, stages
from tpcpu.program.operations import (
    BLOCK,
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    ExpertAttention,
    Experts,
    GatedAdd,
    Glu,
    Heads,
    Kind,
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
    weights,
    weights_of_token,
)

GROUP = 256
"""Blocks of NF4, along the whole tensor row by row, that share a float32 scale of their 8-bit scales."""

PANEL_ROWS = 16
"""Rows that a thread takes together."""

FLOAT_BYTES = {"float32": 4, "float16": 2, "bf16": 2}
FORMATS = ("nf4", "int8", *FLOAT_BYTES)


@dataclass(frozen=True)
class Storage:
    """The formats that weights and cache have in memory. Norms and biases are float32."""

    matrices: str = "nf4"
    head: str = "int8"
    embedding: str = "bf16"
    cache: str = "bf16"
    experts: str = ""
    """Of matrices of experts, where that is another than that of matrices."""

    def of(self, weight: Weight) -> str:
        """The format of one weight; what has rows of no multiple of 64 cannot be cut into blocks and stays bf16."""
        match weight.kind:
            case Kind.VECTOR:
                return "float32"
            case Kind.EMBEDDING | Kind.ROUTER:
                return self.embedding
            case _:
                wanted = self.head if weight.kind is Kind.HEAD else self.matrices
                if weight.kind is Kind.EXPERT and self.experts:
                    wanted = self.experts
                if weight.unit_rows and wanted in FLOAT_BYTES:
                    return "float32"
                return "bf16" if wanted not in FLOAT_BYTES and weight.full_columns % BLOCK else wanted


def weight_bytes(weight: Weight, stored: str) -> int:
    """Bytes of a rank's part of a weight in the format `stored`, its scales included."""
    blocks = weight.size // BLOCK
    match stored:
        case "nf4":
            return weight.size // 2 + blocks + 4 * groups_touched(weight)
        case "int8":
            return weight.size + 4 * blocks
        case "mxfp4":
            return weight.size // 2 + HALVES * blocks
        case _:
            return weight.size * FLOAT_BYTES[stored]


def groups_touched(weight: Weight) -> int:
    """NF4 scale groups in which a rank has blocks: a rank that holds some columns shares groups with its neighbours."""
    return _groups_touched(weight.full_columns, weight.rows, weight.columns) if weight.size else 0


@lru_cache(maxsize=1000)  # experts are alike
def _groups_touched(full_columns: int, held: Range, columns: Range) -> int:
    per_row, part = full_columns // BLOCK, columns.blocks(BLOCK)
    # After `period` rows the pattern of groups repeats, moved on by a whole number of groups.
    period = GROUP // math.gcd(per_row, GROUP)
    first, rows = held.start, len(held)
    if rows <= 2 * period:
        return _groups_of_rows(per_row, part, first, rows)
    once = _groups_of_rows(per_row, part, first, period)
    repeated = _groups_of_rows(per_row, part, first, 2 * period) - once
    return _groups_of_rows(per_row, part, first, period + rows % period) + (rows // period - 1) * repeated


@lru_cache(maxsize=1000)
def _groups_of_rows(per_row: int, part: Range, first: int, rows: int) -> int:
    """Groups that blocks `part` of these rows touch; a row's are consecutive, and the first may be counted already."""
    count, last = 0, -1
    for row in range(first, first + rows):
        start, stop = (row * per_row + part.start) // GROUP, (row * per_row + part.stop - 1) // GROUP
        count += stop - max(start, last + 1) + 1
        last = stop
    return count


@dataclass(frozen=True)
class Cost:
    """What operations of one rank cost. Weights are read once for a step, whatever the number of its tokens."""

    weight_bytes: int = 0
    """Weights that are multiplied: linear, convolution, head."""
    other_bytes: int = 0
    """Norms, biases, and a token's row of the embedding."""
    operations: int = 0
    """Additions and multiplications for one token; an exponential counts as one."""
    operations_per_position: int = 0
    """More of them for every position attended to."""
    cache_bytes: int = 0
    """Written to the cache for one token."""
    cache_bytes_per_position: int = 0
    """Read from the cache for one token and every position attended to."""
    messages: int = 0
    """All-reduces."""
    message_bytes: int = 0
    """The float32 part that this rank gives to them for one token."""
    barriers: int = 0
    """Waits of a rank's threads for one another in a step of one token."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


def costs(program: Program, storage: Storage) -> tuple[Cost, ...]:
    """The cost of each operation of a rank."""
    waits = barriers(program, storage)
    return tuple(
        _cost(operation, program, storage) + Cost(barriers=wait)
        for operation, wait in zip(program.operations, waits, strict=True)
    )


def _cost(operation: Operation, program: Program, storage: Storage) -> Cost:
    read = weights_of_token(operation)
    multiplied = [weight for weight in read if weight.kind.is_packed]
    vectors = [weight for weight in read if weight.kind is Kind.VECTOR]
    held = Cost(
        weight_bytes=sum(weight_bytes(weight, storage.of(weight)) for weight in multiplied),
        other_bytes=sum(weight_bytes(weight, "float32") for weight in vectors),
    )
    held_as = KV_FORMATS[storage.cache]
    match operation:
        case Embed(weight=weight):
            scaled = weight.full_columns if operation.scale != 1 else 0
            return held + Cost(other_bytes=weight.full_columns * FLOAT_BYTES[storage.embedding], operations=scaled)
        case Add():
            return held + Cost(operations=operation.out.width * (2 if operation.bias else 1))
        case RmsNorm():
            return held + Cost(operations=4 * operation.out.width)
        case Linear() | ShortConv() | Logits():
            multiplications = sum(weight.size for weight in multiplied)
            capped = 5 * operation.out.width if isinstance(operation, Logits) and operation.cap else 0
            return held + Cost(operations=2 * multiplications + sum(weight.size for weight in vectors) + capped)
        case LinearByHeads():
            return Cost(
                weight_bytes=round(part_read(operation) * held.weight_bytes),
                operations=2 * operation.x.count * operation.rows * operation.weight.full_columns,
            )
        case RopeAndStore(q_turned=Heads() as q):
            cached = program.kv[operation.layer]
            return Cost(
                operations=3 * (q.count + 1) * operation.rope.dim, cache_bytes=held_as.row_bytes(cached.head_dim)
            )
        case RopeAndStore(q=q, k=k):
            written = 2 * k.count * held_as.row_bytes(k.dim)
            normed = [heads for heads, norm in ((q, operation.q_norm), (k, operation.k_norm)) if norm]
            turned = 3 * (q.count + k.count) * operation.rope.dim
            return held + Cost(
                operations=turned + 4 * sum(heads.count * heads.dim for heads in normed), cache_bytes=written
            )
        case Attention():
            cached = program.kv[operation.layer]
            return held + Cost(
                operations_per_position=operation.heads
                * (
                    2 * operation.head_dim
                    + 2 * (operation.value_dim or operation.head_dim)
                    + 3
                    + (5 if operation.cap else 0)
                    + (3 if operation.slopes else 0)
                ),
                cache_bytes_per_position=cached.rows * cached.heads * held_as.row_bytes(cached.head_dim),
            )
        case Glu():
            return Cost(operations=(4 if operation.activation is Activation.SILU else 8) * len(operation.out.own))
        case GatedAdd():
            return Cost(operations=2 * operation.out.width + 3)
        case ExpertAttention():
            # A product, its part of the softmax, and of the sum: for every pair.
            return Cost(operations=6 * operation.out.width**2)
        case Route():
            # The softmax or the sigmoids, and a look at every score for each choice, of a group or of an expert.
            looks = operation.top + (operation.group_best if operation.groups > 1 else 0)
            added = 1 if operation.correction else 0
            return held + Cost(operations=(2 + looks + added) * operation.scores.width)
        case Experts(inner=inner, out=out):
            multiplications = sum(weight.size for weight in multiplied)
            gate = 4 if operation.clamp is None else 9
            added = sum(weight.size for weight in vectors)
            return held + Cost(
                operations=2 * multiplications + added + operation.top * (gate * len(inner.own) + 2 * out.width)
            )
        case AllReduce():
            return Cost(
                messages=1,
                message_bytes=operation.x.width * 4,
                operations=operation.x.width * (program.share.size - 1),
            )


def part_read(operation: Operation) -> float:
    """Which part of its weights an operation multiplies: of a weight by heads each has rows of its own."""
    if not isinstance(operation, LinearByHeads) or not operation.weight.size:
        return 1.0
    return operation.x.count * operation.rows / len(operation.weight.rows)


def barriers(program: Program, storage: Storage) -> tuple[int, ...]:
    """For each operation of one token how often threads wait for one another, before it and inside: as it is run.

    The end of the step, where they meet once more, is not counted.
    """
    joining = Joining.ALONE if program.share.size == 1 else Joining.WINDOW
    integer = {
        id(operation)
        for operation in program.operations
        if isinstance(operation, Linear | ShortConv | Experts | Logits)
        and any(
            storage.of(weight) not in FLOAT_BYTES for weight in weights(operation) if weight.kind is not Kind.VECTOR
        )
    }
    waits = {}
    for stage in stages(program, integer, joining=joining):
        waits[id(stage.operations[0])] = int(stage.waits) + stage.inner_waits
    return tuple(waits.get(id(operation), 0) for operation in program.operations)


def barriers_per_layer(program: Program, storage: Storage) -> int:
    """The waits of most layers; the first may have one more or less."""
    counts = dict.fromkeys((layer for layer in program.layer_of if layer >= 0), 0)
    for layer, wait in zip(program.layer_of, barriers(program, storage), strict=True):
        if layer >= 0:
            counts[layer] += wait
    return mode(counts.values()) if counts else 0


# Sums over a program, and over all ranks.


def parameters(program: Program) -> int:
    """Parameters of the whole model, from the program of any rank; a tied head counts once."""
    return sum({weight.name: math.prod(weight.full_shape) for weight in program.weights}.values())


def parameters_of_token(program: Program) -> int:
    """Those of them that one token needs: less where it chooses between experts."""
    left = {weight.name: math.prod(weight.full_shape) for weight in unread(program)}
    return parameters(program) - sum(left.values())


def unread(program: Program) -> set[Weight]:
    """Weights that a rank holds and one token does not need; see `weights_of_token`."""
    mixtures = [operation for operation in program.operations if isinstance(operation, Experts)]
    return {weight for op in mixtures for weight in weights(op)[len(weights_of_token(op)) :]}


def weight_bytes_per_token(programs: Sequence[Program], storage: Storage) -> int:
    """Bytes of the weights that all ranks multiply for one token; the embedding's never."""
    return sum(total(costs(program, storage)).weight_bytes for program in programs)


def _alike(found: Iterable[Weight]) -> list[tuple[Weight, int]]:
    """One of each sort of weights that differ in their names only, and how many there are: experts are many."""
    counted: dict[tuple[int | tuple[int, ...], ...], tuple[Weight, int]] = {}
    for weight in found:
        rows, columns = weight.rows, weight.columns
        key = (
            id(weight.kind), weight.full_shape, rows.start, rows.stop, columns.start, columns.stop, weight.unit_rows
        )  # fmt: skip
        first, count = counted.get(key, (weight, 0))
        counted[key] = first, count + 1
    return list(counted.values())


def bits_per_nf4_weight(programs: Sequence[Program], storage: Storage) -> float | None:
    """Mean over all NF4 weights that the ranks hold; None where nothing is NF4."""
    held = [each for program in programs for each in _alike(program.weights) if storage.of(each[0]) == "nf4"]
    count = sum(number * weight.size for weight, number in held)
    return 8 * sum(number * weight_bytes(weight, "nf4") for weight, number in held) / count if count else None


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank keeps; activations and the checkpoint's mapped pages are not counted."""

    weights: int
    vectors: int
    cache: int
    """Keys and values of one sequence that fills the context."""
    states: int
    """The convolutions' last inputs of one sequence, and that behind each page, float32."""

    @property
    def total(self) -> int:
        return self.weights + self.vectors + self.cache + self.states


def memory(program: Program, storage: Storage, context: int, sequences: int = 1, page_tokens: int = 64) -> Memory:
    """What one rank keeps for sequences of `context` positions. The embedding is kept once per host: see below."""
    alike = _alike(program.weights)
    packed = [(weight, count) for weight, count in alike if weight.kind.is_packed]
    return Memory(
        weights=sum(count * weight_bytes(weight, storage.of(weight)) for weight, count in packed),
        vectors=sum(count * weight_bytes(each, "float32") for each, count in alike if each.kind is Kind.VECTOR),
        cache=sum(kv.rows * KV_FORMATS[storage.cache].page_bytes(kv, context) for kv in program.kv) * sequences,
        states=(RING + -(-context // page_tokens)) * 4 * sum(program.states) * sequences,
    )


def embedding_bytes(program: Program, storage: Storage) -> int:
    """Bytes of the embedding, which the ranks of a host share."""
    return sum(
        math.prod(weight.full_shape) * FLOAT_BYTES[storage.embedding]
        for weight in program.weights
        if weight.kind is Kind.EMBEDDING
    )


def balance(program: Program, threads: int, storage: Storage) -> float:
    """How evenly the weights of one token are divided over a rank's threads: mean ÷ largest share of bytes.

    A unit is one span of 1024 features of a panel of 16 rows. Operations follow one another, so the largest share is
    taken operation by operation. 1 where nothing is held.
    """
    mean = largest = 0.0
    for operation in program.operations:
        held = [
            (weight, weight_bytes(weight, storage.of(weight)) / len(weight.rows))
            for weight in weights_of_token(operation)
            if weight.size and weight.kind.is_packed
        ]
        units = sum(_panels(weight) * _spans(weight) for weight, _ in held)
        parts = [Share(thread, threads).split(units) for thread in range(threads)]
        shares = [_bytes_before(part.stop, held) - _bytes_before(part.start, held) for part in parts]
        mean += sum(shares) / threads
        largest += max(shares)
    return mean / largest if largest else 1.0


def _panels(weight: Weight) -> int:
    return -(-len(weight.rows) // PANEL_ROWS)


def _spans(weight: Weight) -> int:
    return -(-len(weight.columns) // (SPAN * BLOCK))


def _bytes_before(unit: int, held: Sequence[tuple[Weight, float]]) -> float:
    """Of the units before number `unit`; `held` gives weights and bytes of a row. Last ones may be short."""
    before = 0.0
    for weight, row_bytes in held:
        rows, columns, spans = len(weight.rows), len(weight.columns), _spans(weight)
        panel, span = divmod(min(unit, _panels(weight) * spans), spans)
        before += min(panel * PANEL_ROWS, rows) * row_bytes
        begun = min(PANEL_ROWS, rows - panel * PANEL_ROWS)
        before += max(begun, 0) * row_bytes * span * SPAN * BLOCK / columns
        unit = max(unit - _panels(weight) * spans, 0)
    return before
