"""Where the time of a token goes: what the walker has noted, by operation and by class.

A wait after a kernel is never the kernel's: threads that wait for each other have it under `other`, and around an
exchange ranks wait for ranks, `all_reduce`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels.compile import Kernel
from tpcpu.program.lowering import Stage
from tpcpu.program.naming import joined, shown
from tpcpu.program.operations import (
    AllReduce,
    Attention,
    Experts,
    Linear,
    LinearByHeads,
    Logits,
    RopeAndStore,
    ShortConv,
    Weight,
)

CLASSES = ("linear", "conv", "attention", "all_reduce", "other")

Stages = Sequence[tuple[Stage, Kernel]]


def class_of(stage: Stage, kernel: Kernel) -> str:
    """The class of one record's time. What prepares a product without being one is `other`."""
    product = kernel.name.startswith("linear")
    for operation in stage.operations:
        match operation:
            case AllReduce():
                return "all_reduce"
            case Linear() | LinearByHeads() | Experts() | Logits() if product:
                return "linear"
            case ShortConv() if product:
                return "conv"
            case Attention() | RopeAndStore():
                return "attention"
    return "other"


def label_of(stage: Stage, kernel: Kernel) -> str:
    """The same for all layers: the kernel, and the weights that it multiplies."""
    if not kernel.name.startswith("linear"):
        return kernel.name
    return joined(_multiplied(stage))


def _multiplied(stage: Stage) -> list[Weight]:
    return [weight for operation in stage.operations for weight in shown(operation) if weight.kind.is_packed]


def shares(stages: Stages, seconds: NDArray[np.float64], step: float) -> dict[str, float]:
    """Seconds of one token by class, adding up to `step`: what is not in the walk is `other`.

    `seconds` (threads, records, 2): in kernels and after them, for one token.
    """
    mean = seconds.mean(axis=0)
    times = dict.fromkeys(CLASSES, 0.0)
    for (stage, kernel), (inside, after) in zip(stages, mean.tolist(), strict=True):
        kind = class_of(stage, kernel)
        times[kind] += inside
        times["all_reduce" if kind == "all_reduce" else "other"] += after
    times["other"] += max(step - sum(times.values()), 0.0)
    return times


@dataclass
class Row:
    """One line of the table of operations, over all layers: microseconds and bytes for one token."""

    label: str
    kind: str
    calls: int = 0
    inside: float = 0.0
    after: float = 0.0
    nbytes: int = 0


def table(stages: Stages, seconds: NDArray[np.float64], nbytes: dict[int, int]) -> list[Row]:
    """Rows in the order in which the operations first come. `nbytes`: of records, by number."""
    rows: dict[tuple[str, str], Row] = {}
    for number, ((stage, kernel), (inside, after)) in enumerate(
        zip(stages, seconds.mean(axis=0).tolist(), strict=True)
    ):
        key = label_of(stage, kernel), class_of(stage, kernel)
        row = rows.setdefault(key, Row(*key))
        row.calls += 1
        row.inside += 1e6 * inside
        row.after += 1e6 * after
        row.nbytes += nbytes.get(number, 0)
    return list(rows.values())


def table_lines(rows: Sequence[Row], step: float) -> list[str]:
    """For people; `step` is the seconds of one token."""
    lines = [f"{'operation':<42}{'class':<11}{'calls':>6}{'us':>10}{'wait us':>9}{'MB':>9}{'GB/s':>8}{'share':>8}"]
    for row in rows:
        rate = f"{row.nbytes / row.inside / 1e3:.1f}" if row.nbytes and row.inside else ""
        lines.append(
            f"{row.label[-41:]:<42}{row.kind:<11}{row.calls:>6}{row.inside:>10.1f}{row.after:>9.1f}"
            f"{row.nbytes / 1e6:>9.2f}{rate:>8}{row.inside / step / 1e4:>7.1f}%"
        )
    outside = 1e6 * step - sum(row.inside + row.after for row in rows)
    lines.append(f"{'outside the walk':<42}{'other':<11}{'':>6}{outside:>10.1f}{'':>9}{'':>9}{'':>8}"
                 f"{outside / step / 1e4:>7.1f}%")  # fmt: skip
    return lines
