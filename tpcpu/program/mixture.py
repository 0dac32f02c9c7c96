"""Records of a mixture of experts: routing, and products whose weights are chosen as they run.

Knows how pairs of a token and an expert lie in memory, which all layers of a shape share; see `kernels.experts`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tpcpu.kernels import activations, experts
from tpcpu.kernels import record as R
from tpcpu.program.memory import Buffers, Place, Records, stride_bytes
from tpcpu.program.operations import BLOCK, Expert, Experts, Route, Scoring, Weight
from tpcpu.program.products import Input, Products, Rounded
from tpcpu.program.weights import Stored, float_bits, panel_bytes

Words = dict[int, int]
Pick = Callable[[Expert], tuple[tuple[Weight, Weight | None], ...]]
"""Matrices of an expert, each with its bias."""


class _Rows:
    """Memory for the activations of pairs, as float32 and as int8."""

    def __init__(self, buffers: Buffers, rows: int, width: int) -> None:
        blocks = -(-width // BLOCK)
        stride, scales_stride = BLOCK * blocks, 4 * (blocks + 16)
        self.stride = stride_bytes(width)
        self.floats = buffers.take(rows * self.stride)
        values, scales, sums = (buffers.take(rows * each) for each in (stride, scales_stride, scales_stride))
        self.rounded = Rounded(values, stride, scales, sums, scales_stride)

    def operands(self, integer: bool) -> Words:
        """As what a product reads."""
        return self.rounded.operands() if integer else {R.X: self.floats, R.X_STRIDE: self.stride}


@dataclass(frozen=True)
class _Room:
    """What mixtures of one shape share, one after another. `own`: memory of each thread."""

    x: _Rows
    gate: Place
    up: Place
    inner: _Rows
    down: Place
    starts: int
    pairs: int
    numbers: int
    own: int
    own_bytes: int


class Mixtures:
    """Writes the records of mixtures for batches of at most `tokens`."""

    def __init__(self, products: Products, buffers: Buffers, records: Records, *, threads: int, tokens: int) -> None:
        self._products, self._buffers, self._records = products, buffers, records
        self._threads, self._tokens = threads, tokens
        self._rooms: dict[tuple[int, ...], _Room] = {}
        self._choices: dict[tuple[int, int], int] = {}

    def add(self, route: Route, op: Experts, scores: Place, read: Input, choice: Place, out: Place) -> None:
        """`read`: the activations, rounded or not yet; `out`: where the sum of a token's experts goes."""
        room, products, add = self._room(op), self._products, self._records.add
        chosen = {
            R.E_TOP: op.top, R.E_EXPERTS: len(op.experts), R.E_CHOICE: choice.address, R.E_CHOICE_STRIDE: choice.stride,
            R.E_CHOICE_ONE: products.copies(Route, route.out.width)[R.ROW], R.E_NORMALISED: int(route.normalised),
            R.E_STARTS: room.starts, R.E_PAIRS: room.pairs, R.E_NUMBERS: room.numbers,
        }  # fmt: skip
        from_scores = {R.IN: scores.address, R.IN_STRIDE: scores.stride, R.WIDTH: route.scores.width}
        add([experts.route_one, experts.route, experts.route], chosen | from_scores | self._choosing(route))
        add([activations.nothing, experts.arrange, experts.arrange], chosen)

        def outer(expert: Expert) -> tuple[tuple[Weight, Weight | None], ...]:
            return (expert.gate, expert.gate_bias), (expert.up, expert.up_bias)

        formats = self._formats(op, outer)
        if not read.is_rounded and any(map(products.multiplies_integers, formats)):
            products.round(op.x, read.place)
        gathered = {each: room.x.operands(products.multiplies_integers(each)) for each in formats}
        for each in {products.multiplies_integers(each): each for each in formats}.values():
            words = chosen | products.activations(each, read) | _of_pairs(gathered[each])
            add([activations.nothing, experts.gather, experts.gather], words)
        for each in formats:
            words = chosen | products.activations(each, read) | _of_pairs(gathered[each])
            self._product(op, each, words, outer, (room.gate, room.up), apart=each == formats[-1])
        self._records.wait()
        self._gate_and_down(op, chosen)
        words = {**_rows(room.down), R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: op.out.width}
        add([experts.combine_of_one, experts.combine, experts.combine], chosen | words)

    def _choosing(self, route: Route) -> Words:
        """What a choice depends on beside scores."""
        key, stride = (route.scores.width, route.groups), experts.choice_bytes(route.scores.width, route.groups)
        if key not in self._choices:
            self._choices[key] = self._buffers.take(self._threads * stride)
        return {
            R.T_SIGMOID: int(route.scoring is Scoring.SIGMOID), R.T_GROUPS: route.groups,
            R.T_TOP_GROUPS: route.top_groups, R.T_GROUP_BEST: route.group_best, R.T_FACTOR: float_bits(route.factor),
            R.T_OWN: self._choices[key], R.T_OWN_STRIDE: stride,
            R.BIAS: self._products.vector(route.correction) if route.correction else 0,
        }  # fmt: skip

    def _gate_and_down(self, op: Experts, chosen: Words) -> None:
        room, products = self._room(op), self._products

        def inner(expert: Expert) -> tuple[tuple[Weight, Weight | None], ...]:
            return ((expert.down, expert.down_bias),)

        formats = self._formats(op, inner)
        words = {
            **_rows(room.gate), R.SECOND: room.up.address, R.SECOND_STRIDE: room.up.stride,
            R.OUT: room.inner.floats, R.OUT_STRIDE: room.inner.stride, R.WIDTH: len(op.inner.own),
            R.E_FIRST: op.inner.own.start, R.E_COLUMNS: -(-op.inner.width // BLOCK) * BLOCK,
        }  # fmt: skip
        if op.clamp is not None:
            words |= {R.ACTIVATION: R.CLAMPED, R.LIMIT: float_bits(op.clamp.limit)}
            words[R.SHARPNESS] = float_bits(op.clamp.sharpness)
        if any(map(products.multiplies_integers, formats)):
            words |= room.inner.rounded.words()
        self._records.add([experts.gate_of_one, experts.gate, experts.gate], chosen | words)
        for each in formats:
            operands = room.inner.operands(products.multiplies_integers(each))
            words = chosen | operands | _of_pairs(operands) | {R.X_ONE: operands[R.X], R.E_APART: 1}
            self._product(op, each, words, inner, (room.down,), apart=each == formats[-1])
        self._records.wait()

    def _formats(self, op: Experts, pick: Pick) -> list[Stored]:
        """Those that the picked matrices of the experts are in."""
        return sorted({self._products.packed(weight).stored for expert in op.experts for weight, _ in pick(expert)})

    def _product(
        self, op: Experts, stored: Stored, words: Words, pick: Pick, places: tuple[Place, ...], *, apart: bool
    ) -> None:
        """The record of the picked matrices of one format; those of others are left out of their experts."""
        table = np.zeros((len(op.experts), len(places), R.SEGMENT_WORDS), np.int64)
        for rows, expert in zip(table, op.experts, strict=True):
            for row, (weight, bias), place in zip(rows, pick(expert), places, strict=True):
                packed = self._products.packed(weight)
                row[R.S_COLUMNS] = len(weight.columns)
                if packed.stored == stored:
                    row[:] = packed.segment
                    row[R.S_BIAS] = self._products.vector(bias) if bias is not None and bias.size else 0
                row[R.S_OUT], row[R.S_OUT_STRIDE] = place.address, place.stride
        self._products.keep.append(table)
        room, columns = self._room(op), int(table[0, 0, R.S_COLUMNS])
        values, scales = panel_bytes(columns, stored[0])
        self._records.add(
            [experts.product_of_one, experts.product, experts.product],
            {
                **words, **self._products.settings(stored, columns), R.COUNT: self._records.step + 8 * R.TOKENS,
                R.E_SEGMENTS: table.ctypes.data, R.E_PARTS: len(places), R.E_OWN: room.own,
                R.E_OWN_STRIDE: room.own_bytes, R.E_PANEL_BYTES: values, R.E_SCALES_BYTES: scales,
            },
            apart=apart,
            calls=dict(enumerate(self._products.kernels(stored), R.E_KERNELS)),
        )  # fmt: skip

    def _room(self, op: Experts) -> _Room:
        key = (op.x.width, op.inner.width, op.inner.own.start, op.inner.own.stop, op.out.width, op.top, len(op.experts))
        if key not in self._rooms:
            take, pairs, local = self._buffers.take, self._tokens * op.top, len(op.inner.own)
            own_bytes = experts.own_bytes(2 * op.top)
            self._rooms[key] = _Room(
                x=_Rows(self._buffers, pairs, op.x.width),
                gate=self._place(pairs, local),
                up=self._place(pairs, local),
                # Of one token every thread has rows of its own.
                inner=_Rows(self._buffers, max(self._tokens, self._threads) * op.top, op.inner.width),
                down=self._place(pairs, op.out.width),
                starts=take(4 * (len(op.experts) + 1)),
                pairs=take(4 * pairs),
                numbers=take(4 * pairs),
                own=take(self._threads * own_bytes),
                own_bytes=own_bytes,
            )
        return self._rooms[key]

    def _place(self, rows: int, width: int) -> Place:
        address = self._buffers.take(rows * stride_bytes(width))
        return Place(address, stride_bytes(width), address)


def _rows(place: Place) -> Words:
    return {R.IN: place.address, R.IN_STRIDE: place.stride}


def _of_pairs(operands: Words) -> Words:
    """Operands of a product, as those of the pairs of several tokens."""
    names = {R.X: R.E_X, R.X_SCALES: R.E_X_SCALES, R.X_SUMS: R.E_X_SUMS}
    return {names[word]: value for word, value in operands.items() if word in names}
