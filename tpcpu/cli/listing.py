"""A program as text: one row for each operation and weight, and layers that are alike printed once.

Knows operations, their costs, and columns of text. Prints nothing itself, and reads no weights.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from tpcpu.cli.alike import spans
from tpcpu.parallel.partition import Range
from tpcpu.program import cost
from tpcpu.program.operations import (
    AllReduce,
    Attention,
    Buffer,
    Embed,
    ExpertAttention,
    Experts,
    Kind,
    Linear,
    LinearByHeads,
    Operation,
    Program,
    RopeAndStore,
    Route,
    Weight,
    inputs,
    outputs,
    weights,
)


class Row(NamedTuple):
    """One line: `|` where the threads wait before it, and what the columns say."""

    wait: str
    operation: str
    data: str
    weight: str
    part: str
    stored: str
    size: str


HEADER = Row("", "operation", "in -> out", "weight", "this rank's part", "format", "bytes")
NOTE, RIGHT = HEADER.index("weight"), len(HEADER) - 1
"""Where columns of weights begin, and the one that is flush right."""


class Section(NamedTuple):
    """The operations of one layer, or those before or after the layers (layer -1)."""

    layer: int
    rows: list[Row]
    weight_bytes: int


def listing(program: Program, storage: cost.Storage, every_layer: bool = False) -> list[str]:
    """The lines that show a rank's program; equal layers that follow one another stand once, unless `every_layer`."""
    spent = cost.costs(program, storage)
    sections = []
    for layer, group in groupby(range(len(spent)), key=program.layer_of.__getitem__):
        labels: dict[Buffer, str] = {}
        numbers = list(group)
        rows = [row for number in numbers for row in _rows(program, number, spent[number], storage, labels)]
        sections.append(Section(layer, rows, sum(spent[number].weight_bytes for number in numbers)))

    table: list[Row | str] = [HEADER]
    for _, alike in groupby(enumerate(sections), key=lambda pair: (pair[1].rows, every_layer and pair[0])):
        same = [section for _, section in alike]
        heading = _heading([section.layer for section in same], same[0].weight_bytes, first=len(table) == 1)
        table += ["", heading, *same[0].rows]
    return _aligned(table)


def size(count: float) -> str:
    """Bytes with three digits, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.{1 if count >= 9.995 else 2}f} {unit}"


def _heading(layers: list[int], weight_bytes: int, first: bool) -> str:
    if layers[0] < 0:
        return "before the layers" if first else "after the layers"
    if len(layers) == 1:
        return f"layer {layers[0]}: {size(weight_bytes)} of weights"
    return f"layers {spans(layers)}, all alike: each {size(weight_bytes)} of weights"


def _rows(program: Program, number: int, one: cost.Cost, storage: cost.Storage, labels: dict[Buffer, str]) -> list[Row]:
    """The rows of one operation: one at least, and one for each weight that this rank multiplies."""
    operation, layer = program.operations[number], f".{program.layer_of[number]}."
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(operation).__name__).lstrip("_")
    first = Row("|" * one.barriers, name, _data(operation, labels), "", _note(operation, one, program), "", "")
    if isinstance(operation, Linear):
        held = [(segment.weight, segment.bias) for segment in operation.segments if segment.weight.size]
        if not held:
            return [first._replace(part="nothing on this rank")]
    elif isinstance(operation, RopeAndStore):
        held = [(norm, None) for norm in weights(operation)]
    elif isinstance(operation, Experts):
        return _experts(operation, first, layer, storage)
    else:
        read = weights(operation)
        held = [(read[0], read[1] if len(read) > 1 else None)] if read else []
    rows = []
    for weight, bias in held:
        stored = storage.of(weight)
        # Of the embedding one row is read; everything else is read whole.
        count = one.other_bytes if isinstance(operation, Embed) else cost.weight_bytes(weight, stored)
        if isinstance(operation, LinearByHeads):
            count, part = one.weight_bytes, f"{operation.x.count} times {operation.rows} rows of {_part(weight)}"
            first = first._replace(part=part)
        short = _short(weight, layer)
        short += " + bias" if bias else ""
        rows.append(Row("", "", "", short, first.part or _part(weight), stored, size(count)))
    if not rows:
        return [first]
    return [rows[0]._replace(wait=first.wait, operation=name, data=first.data), *rows[1:]]


def _experts(operation: Experts, first: Row, layer: str, storage: cost.Storage) -> list[Row]:
    """A row for each matrix of an expert: what one has, and the bytes of as many as a token chooses."""
    count, rows, first_one = len(operation.experts), [], operation.experts[0]
    bias = " + bias" if first_one.down_bias else ""
    for weight in first_one.matrices:
        stored = storage.of(weight)
        nbytes = operation.top * cost.weight_bytes(weight, stored)
        name = _short(weight, layer).replace(".0.", f".0-{count - 1}.", 1) + bias
        rows.append(Row("", "", "", name, f"{operation.top} of {count} times {_part(weight)}", stored, size(nbytes)))
    return [rows[0]._replace(wait=first.wait, operation=first.operation, data=first.data), *rows[1:]]


def _short(weight: Weight, layer: str) -> str:
    """A weight's name inside its layer, and which of those in a tensor it is."""
    return " ".join([weight.name.split(layer, 1)[-1].removesuffix(".weight"), weight.section]).rstrip()


def _data(operation: Operation, labels: dict[Buffer, str]) -> str:
    """The buffers read and written, with widths; where the rank fills only some columns, which."""

    def named(buffer: Buffer) -> str:
        """Buffers of one name are numbered in the order in which a layer meets them."""
        if buffer not in labels:
            kind = buffer.name.rpartition(".")[0]
            before = sum(label.partition(".")[0] == kind for label in labels.values())
            labels[buffer] = f"{kind}.{before + 1}" if before else kind
        own = "" if buffer.own == Range(0, buffer.width) else f" (own {_span(buffer.own)})"
        return f"{labels[buffer]} {buffer.width}{own}"

    read = ", ".join([named(buffer) for buffer in inputs(operation)]) or "tokens"
    return f"{read} -> {', '.join([named(buffer) for buffer in outputs(operation)])}"


def _note(operation: Operation, one: cost.Cost, program: Program) -> str:
    """What an operation says that has no divided weight."""
    match operation:
        case Embed():
            return "the row of a token"
        case AllReduce(x=x):
            return f"gives {x.width} float32, {size(one.message_bytes)}"
        case RopeAndStore(q=q, k=k, rope=rope):
            turned = f"theta {rope.theta:g}" if rope.dim else "not turned"
            if rope.scaling is not None:
                turned += f" {type(rope.scaling).__name__.removesuffix('Scaling').lower()}"
            dim = program.kv[operation.layer].head_dim
            return f"{q.count} q, {k.count} kv heads of {dim}, {turned}; writes {size(one.cache_bytes)}"
        case ExpertAttention(out=out):
            return f"each of {out.width} experts attends to all"
        case Route(scores=scores, top=top, normalised=normalised):
            kept = f" in the {operation.top_groups} best of {operation.groups} groups" if operation.groups > 1 else ""
            return f"the {top} best of {scores.width}{kept}" + (", their weights adding up to 1" if normalised else "")
        case Attention():
            kv = program.kv[operation.layer]
            read = size(one.cache_bytes_per_position)
            seen = f", the last {operation.window} of them" if operation.window else ""
            return f"{operation.heads} q, {kv.heads} kv heads of {kv.head_dim}; reads {read} a position{seen}"
        case _:
            return ""


def _part(weight: Weight) -> str:
    """Which rows and columns a rank holds of a weight, and of what."""
    full = {"rows": weight.full_rows, "columns": weight.full_columns}
    if weight.kind is Kind.VECTOR:
        del full["columns"]
    whole = " x ".join(map(str, full.values()))
    if not weight.size:
        return f"nothing of {whole}"
    cut = [
        f"{name} {_span(held)}"
        for name, held in (("rows", weight.rows), ("columns", weight.columns))
        if len(held) < full.get(name, 0)
    ]
    return f"{', '.join(cut)} of {whole}" if cut else f"all {whole}"


def _span(held: Range) -> str:
    """First and last; both are held."""
    return f"{held.start}-{held.stop - 1}" if len(held) else "none"


def _aligned(table: Iterable[Row | str]) -> list[str]:
    """The columns under one another; the note of a row without a weight runs on over the columns of weights."""
    table = list(table)
    full = [row for row in table if isinstance(row, Row) and row.stored]
    notes = [row for row in table if isinstance(row, Row) and not row.stored]
    widths = [
        max(len(row[column]) for row in (full if column >= NOTE else full + notes)) for column in range(len(HEADER))
    ]
    lines = []
    for row in table:
        if isinstance(row, str):
            lines.append(row)
            continue
        cells = [cell.rjust(width) if column == RIGHT else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells if row.stored else [*cells[:NOTE], row.part]).rstrip())
    return lines
