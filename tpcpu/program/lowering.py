"""Which operations become one kernel, and which activations are rounded where: the table of joining rules.

The other readers of a program never see this. A rule joins neighbours only where the joined kernel gives the bits of
the two apart; tests hold each rule to that.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tpcpu.program.operations import Add, Linear, Operation, Program, RmsNorm


@dataclass(frozen=True)
class Stage:
    """Operations that run as one. `rounded`: the first product after it wants the result as int8."""

    operations: tuple[Operation, ...]
    rounded: bool = False


def stages(program: Program, integer: Collection[int], *, join: bool = True) -> list[Stage]:
    """Groups neighbours. `integer`: ids of operations whose products take int8; without `join`, nothing is joined."""
    result: list[Stage] = []
    operations = list(program.operations)
    while operations:
        group = [operations.pop(0)]
        following = operations[0] if operations else None
        # x + y, then the norm of the sum.
        if join and isinstance(group[0], Add) and isinstance(following, RmsNorm) and following.x is group[0].out:
            group.append(operations.pop(0))
            following = operations[0] if operations else None
        # A norm, then a product that wants its result as int8.
        last = group[-1]
        rounded = (
            join
            and isinstance(last, RmsNorm)
            and isinstance(following, Linear)
            and following.x is last.out
            and id(following) in integer
        )
        result.append(Stage(tuple(group), rounded))
    return result
