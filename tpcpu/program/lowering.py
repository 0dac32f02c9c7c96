"""Which operations become one stage, what is rounded where, and where threads wait for one another.

A stage is what `compiled.py` lowers as one. The rules join neighbours only where the joined kernel gives the bits of
the two apart; tests hold each rule to that. `cost.py` counts the waits; the other readers never see any of this.

In steps of several tokens threads wait after every kernel. In steps of one token, where a wait costs as much as the
work between two of them, they do so only where data crosses threads. What a thread writes of a buffer is either the
rows of a weight that it holds, or its slice of features, which is the same in every buffer of a width; and what it
reads is either that slice or the whole. Activations that a product reads as a whole, a norm's or a gate's result, every
thread computes for itself: the *copy*.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from tpcpu.program.operations import (
    BLOCK,
    Add,
    AllReduce,
    Attention,
    Buffer,
    Embed,
    ExpertAttention,
    Experts,
    GatedAdd,
    Glu,
    Linear,
    LinearByHeads,
    Logits,
    Operation,
    Program,
    RmsNorm,
    RopeAndStore,
    Route,
    ShortConv,
    inputs,
    outputs,
)


class Joining(Enum):
    """How an all-reduce is carried out, as far as it decides who waits for whom."""

    ALONE = "one rank: nothing is done"
    WINDOW = "threads of all ranks wait for those whose features they add, and add slices"
    HOSTS = "the same inside each host, then between hosts with a wait on either side of the message"
    CALL = "thread 0 calls MPI with the whole message; what comes back is added by slices"


@dataclass(frozen=True)
class Stage:
    """Operations that run as one."""

    operations: tuple[Operation, ...]
    rounded: bool = False
    """The products that follow read the result as int8, which the stage makes of it."""
    waits: bool = False
    """In steps of one token threads wait for one another before it;"""
    from_copy: bool = False
    """the product, or the convolution, reads each thread's copy of its input;"""
    inner_waits: int = 0
    """and threads wait so often inside."""


def stages(
    program: Program, integer: Collection[int], *, joining: Joining = Joining.ALONE, join: bool = True
) -> list[Stage]:
    """The stages of a program in order.

    `integer`: ids of operations whose products take int8. Without `join` nothing is joined that need not be.
    """
    meetings = _Meetings(joining, frozenset(integer))
    result: list[Stage] = []
    for group, rounded in _groups(program, integer, joining, join):
        from_copy = meetings.has_copy(group[-1])
        waits, inner = meetings.enter(group, rounded, from_copy)
        result.append(Stage(group, rounded, waits, from_copy, inner))
    return result


def _groups(
    program: Program, integer: Collection[int], joining: Joining, join: bool
) -> list[tuple[tuple[Operation, ...], bool]]:
    """Neighbours that become one stage, and whether its result is rounded."""
    result = []
    operations = list(program.operations)
    while operations:
        group = [operations.pop(0)]
        following = operations[0] if operations else None
        if _joins(group[0], following, joining, join):
            assert following is not None
            group.append(operations.pop(0))
            following = operations[0] if operations else None
        # A norm or a gate, then a product that wants its result as int8.
        last = group[-1]
        rounded = (
            join
            and isinstance(last, RmsNorm | Glu)
            and last.out.own.start % BLOCK == 0
            and _is_read_rounded(last.out, operations, integer)
        )
        result.append((tuple(group), rounded))
    return result


def _is_read_rounded(buffer: Buffer, following: Sequence[Operation], integer: Collection[int]) -> bool:
    """Whether the first product that takes int8 reads a buffer, and what comes before it are products that do not."""
    for operation in following:
        if isinstance(operation, Linear | Experts | Logits) and id(operation) in integer:
            return operation.x is buffer
        if not isinstance(operation, Linear | ExpertAttention | Route):
            break
    return False


def _joins(first: Operation, second: Operation | None, joining: Joining, join: bool) -> bool:
    match first, second:
        case RopeAndStore(), Attention():
            # One token is rotated and stored by the attention over it.
            return second.q is first.out
        case Route(), Experts():
            # Of one token every thread chooses for itself.
            return second.choice is first.out
        case AllReduce(), Add():
            # The sum over the ranks, then what is added to it.
            added = second.y is first.out and second.x is not first.out
            return join and joining in (Joining.WINDOW, Joining.HOSTS) and added
        case Add(), RmsNorm():
            # x + y, then the norm of the sum.
            return join and second.x is first.out
    return False


class _Meetings:
    """Who has written what since threads last met."""

    def __init__(self, joining: Joining, integer: frozenset[int]) -> None:
        self._joining, self._integer = joining, integer
        self._by_slices: dict[Buffer, bool] = {}
        """Buffers written since then; whether by slices of features, or by rows."""
        self._exchanged = False
        """Whether partial sums have been joined since then."""
        self._copies: dict[tuple[type, int], tuple[Buffer, bool]] = {}
        """By the kind of operation and the width, whose memory it is: what threads have copies of, and if rounded."""

    def has_copy(self, operation: Operation) -> bool:
        """Whether every thread has the input of a product or a convolution for itself, rounded where that is read."""
        if not isinstance(operation, Linear | Experts | Logits | ShortConv):
            return False
        as_floats = isinstance(operation, ShortConv) or id(operation) not in self._integer
        return any(buffer is operation.x and (as_floats or rounded) for buffer, rounded in self._copies.values())

    def enter(self, group: tuple[Operation, ...], rounded: bool, from_copy: bool) -> tuple[bool, int]:
        """Whether threads have to wait before a stage, and how often inside."""
        waits, inner = False, 0
        made = {out for operation in group for out in outputs(operation)}
        for operation in group:
            match operation:
                case Embed():
                    self._write(operation.out, by_slices=True)
                case AllReduce() if self._joining is Joining.ALONE:
                    if operation.x in self._by_slices:
                        self._by_slices[operation.out] = self._by_slices[operation.x]
                case AllReduce() if self._joining in (Joining.WINDOW, Joining.HOSTS):
                    # Partial sums of a product lie where they are added; between two exchanges threads meet.
                    waits |= (self._exchanged or self._by_slices.get(operation.x, False)) and self._meet()
                    if self._joining is Joining.HOSTS:
                        self._meet()
                        inner += 2
                    self._write(operation.out, by_slices=True)
                    self._exchanged = True
                case AllReduce():
                    waits |= self._meet_for(whole=[operation.x])
                    self._meet()
                    inner += 1
                    self._write(operation.out, by_slices=False)
                case GatedAdd():
                    waits |= self._meet_for(whole=[operation.gate], slices=[operation.x, operation.y])
                    self._write(operation.out, by_slices=True)
                case Route():
                    waits |= self._meet_for(whole=[operation.scores])
                case Experts():
                    # Between products, and before the sum, which is by slices.
                    waits |= self._meet_for(whole=[] if from_copy else [operation.x])
                    if id(operation) in self._integer and not from_copy:
                        self._overwrite(operation.x.width)
                    self._meet()
                    inner += 2
                    self._write(operation.out, by_slices=True)
                case Add() if len(group) == 1 or isinstance(group[0], AllReduce):
                    waits |= self._meet_for(slices=[x for x in inputs(operation) if x not in made])
                    self._write(operation.out, by_slices=True)
                case Add():
                    waits |= self._meet_for(whole=inputs(operation))
                    self._write(operation.out, by_slices=True)
                case RmsNorm() | Glu():
                    waits |= self._meet_for(whole=[x for x in inputs(operation) if x not in made])
                    self._write(operation.out, by_slices=True)
                    if rounded:
                        self._overwrite(operation.out.width)
                    if operation.out.own.start == 0:
                        self._copies[type(operation), operation.out.width] = operation.out, rounded
                case ExpertAttention():
                    waits |= self._meet_for(whole=inputs(operation))
                    self._write(operation.out, by_slices=False)
                case RopeAndStore():
                    waits |= self._meet_for(whole=inputs(operation))
                case Attention():
                    self._meet()
                    # Where values lie in keys, these are stored before anybody reads them.
                    inner += 2 if operation.value_dim else 1
                    self._write(operation.out, by_slices=False)
                case LinearByHeads():
                    waits |= self._meet_for(whole=inputs(operation))
                    self._write(operation.out, by_slices=False)
                case Linear() | ShortConv():
                    # What goes to the other ranks lies where they may still be reading the message before the last.
                    waits |= self._exchanged and self._meet()
                    waits |= self._meet_for(whole=[] if from_copy else [operation.x])
                    if id(operation) in self._integer:
                        if isinstance(operation, ShortConv):
                            self._overwrite(2 * operation.x.width)
                        elif not from_copy:
                            self._overwrite(operation.x.width)
                    for out in outputs(operation):
                        self._write(out, by_slices=False)
                case Logits():
                    if not from_copy:
                        # The row that all write together may be a thread's own of before.
                        waits |= self._meet()
                        inner += 1
                    if operation.cap:
                        self._meet()
                        inner += 1
        return waits, inner

    def _meet_for(self, whole: Collection[Buffer] = (), slices: Collection[Buffer] = ()) -> bool:
        """Meets if something that will be read may have been written by another thread."""
        crosses = any(buffer in self._by_slices for buffer in whole)
        crosses |= any(not self._by_slices.get(buffer, True) for buffer in slices)
        return crosses and self._meet()

    def _meet(self) -> bool:
        self._by_slices.clear()
        self._exchanged = False
        return True

    def _overwrite(self, width: int) -> None:
        """Activations of a width are rounded to one place: what was there is no more."""
        for key, (buffer, _) in self._copies.items():
            if buffer.width == width:
                self._copies[key] = buffer, False

    def _write(self, buffer: Buffer, by_slices: bool) -> None:
        self._by_slices[buffer] = by_slices
