"""Which parts of a checkpoint the weights of a job are made of, and which region of each the ranks need.

Knows how formats divide a weight into stored tensors. The rows and columns of a weight that a rank needs are the
model's to say; here they are only counted in the items of each part. Reads no values.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.header import NUMPY_DTYPES
from tpcpu.engine.binding import Binding
from tpcpu.formats import int8, mxfp4
from tpcpu.parallel.partition import Range
from tpcpu.program.operations import BLOCK, Kind, Weight

SCALES = "scales"
"""What follows the name of a tensor in fp8, of its scales, whatever they are called in the checkpoint."""

GROUP = 256
"""Blocks whose scales share a scale of their own."""


@dataclass(frozen=True)
class Region:
    """Rows and columns of a matrix."""

    rows: Range
    columns: Range

    @property
    def is_empty(self) -> bool:
        return not len(self.rows) or not len(self.columns)


NOTHING = Region(Range(0, 0), Range(0, 0))


@dataclass(frozen=True)
class Part:
    """A stored tensor as a matrix of items, and the region of it that a rank needs, for each rank that is known."""

    name: str
    dtype: np.dtype[Any]
    rows: int
    columns: int
    needs: Mapping[int, Region]

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def need(self, rank: int) -> Region:
        return self.needs.get(rank, NOTHING)

    def need_bytes(self, rank: int) -> int:
        need = self.need(rank)
        return len(need.rows) * len(need.columns) * self.dtype.itemsize


Needed = tuple[Binding, dict[str, Part]]
"""A weight and its parts."""


def needed(
    bindings: Sequence[Binding], weights: Mapping[int, Iterable[Weight]], checkpoint: Checkpoint
) -> list[Needed]:
    """The bindings of a rank with their parts, each part once; `weights`: as the ranks that are known declare them.

    An embedding that is the head too has none: it is read as the head.
    """
    tables = {rank: {each.key: each for each in declared} for rank, declared in weights.items()}
    heads = {binding.weight.name for binding in bindings if binding.weight.kind is Kind.HEAD}
    found: list[Needed] = []
    for binding in bindings:
        name, kind = binding.weight.name, binding.weight.kind
        of_ranks = {rank: table[binding.weight.key] for rank, table in tables.items()}
        is_tied = kind is Kind.EMBEDDING and name in heads
        found.append((binding, {} if is_tied else _parts(binding, of_ranks, checkpoint)))
    return found


def _parts(binding: Binding, weights: Mapping[int, Weight], checkpoint: Checkpoint) -> dict[str, Part]:
    """The stored tensors of a weight, by what follows its name ("" for the values themselves), in the order of use.

    `weights`: the weight as each rank declares it. Small tables that binding has looked at are no parts.
    """
    name, rows, columns = binding.weight.name, binding.weight.full_rows, binding.weight.full_columns

    def part(
        suffix: str, dtype: Any, rows: int, columns: int, need: Callable[[Weight], Region], full_name: str = ""
    ) -> tuple[str, Part]:
        needs = {rank: need(weight) for rank, weight in weights.items()}
        return suffix, Part(full_name or f"{name}{suffix}", np.dtype(dtype), rows, columns, needs)

    def by(unit: int) -> Callable[[Weight], Region]:
        """A rank's rows and columns, these counted in units of so many."""
        return lambda weight: Region(weight.rows, Range(weight.columns.start // unit, weight.columns.stop // unit))

    def whole(suffix: str, dtype: Any, count: int, full_name: str = "") -> tuple[str, Part]:
        return part(suffix, dtype, count, 1, lambda _: Region(Range(0, count), Range(0, 1)), full_name)

    def groups(weight: Weight) -> Region:
        """The group scales of the blocks of a rank's rows."""
        return Region((weight.rows * (columns // BLOCK)).blocks(GROUP), Range(0, 1)) if weight.size else NOTHING

    if binding.weight.kind is Kind.EMBEDDING:
        # Rows are looked up later, where they lie; until then nobody needs any.
        return dict([part("", NUMPY_DTYPES[checkpoint[name].dtype], rows, columns, lambda _: NOTHING)])
    if binding.stored == "nf4":
        assert binding.state is not None
        blocks = binding.state.blocks
        scales_dtype = np.uint8 if binding.nested else np.float32
        if binding.held == "nf4":
            found = [part("", np.uint8, rows, columns // 2, by(2))]
        else:
            # Blocks cross rows: everyone needs all of it.
            found = [whole("", np.uint8, -(-rows * columns // 2))]
        if binding.held == "nf4" and binding.state.block == BLOCK:
            found.append(part(".absmax", scales_dtype, rows, columns // BLOCK, by(BLOCK)))
            of_groups = part(".nested_absmax", np.float32, -(-blocks // GROUP), 1, groups)
        else:
            # Larger blocks may cross rows where those of 64, in which they are held, do not.
            found.append(whole(".absmax", scales_dtype, blocks))
            of_groups = whole(".nested_absmax", np.float32, -(-blocks // GROUP))
        if binding.nested:
            found += [of_groups, whole(".nested_quant_map", np.float32, 256)]
        return dict(found)
    if binding.stored == "int8":
        scales = int8.scale_name("")
        return dict([
            part("", np.int8, rows, columns, by(1)),
            part(scales, np.float32, rows, columns // BLOCK, by(BLOCK)),
        ])  # fmt: skip
    if binding.stored == "mxfp4":
        return dict([
            part("", np.uint8, rows, columns // 2, by(2)),
            part(mxfp4.scales_name(""), np.uint8, rows, columns // mxfp4.BLOCK, by(mxfp4.BLOCK)),
        ])  # fmt: skip
    values = part("", NUMPY_DTYPES[checkpoint[name].dtype], rows, columns, by(1))
    if binding.scaled is None:
        return dict([values])
    of = binding.scaled
    # Blocks may reach beyond a rank's region, and are few.
    return dict([whole(SCALES, NUMPY_DTYPES[checkpoint[of.scales].dtype], math.prod(of.shape), of.scales), values])
