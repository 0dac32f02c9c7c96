"""Small programs bound to memory as the engine binds models, beside the reference that reads the same values.

The fake models here are an embedding whose rows are the inputs, the operation under test, and an identity in float32
for a head: products with 1 and sums with 0 are exact, so the logits are the operation's result, bit for bit.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpcpu.engine.cache import Cache
from tpcpu.formats import floats, int8, mxfp4, nf4
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import AllReduce
from tpcpu.parallel.numa import arena
from tpcpu.parallel.partition import Share
from tpcpu.parallel.team import Team
from tpcpu.program.batch import Batch
from tpcpu.program.builder import Builder
from tpcpu.program.compiled import Compiled
from tpcpu.program.formulas import MatrixValues
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.program.operations import BLOCK, Buffer, Key, Kind, Program, Weight
from tpcpu.program.reference import Reference
from tpcpu.program.weights import Packed, Packer, Source, Table, Vector, packed_bytes, packing_kernels, padded

QUANTISED = {"nf4": R.NF4, "nf4-single": R.NF4_SINGLE, "int8": R.INT8, "mxfp4": R.MXFP4}
FLOATS = {"bf16": R.BF16, "f16": R.F16, "float32": R.FLOAT32}
EVERYTHING = {"candidates": 0, "vocabulary": 2**31 - 1}
"""What a batch asks of logits here: all of them."""

FORMS = QUANTISED | FLOATS
DTYPES = {"bf16": "bfloat16", "f16": "float16", "float32": "float32"}

TOLERANCES = {
    # All are of the largest value of a token's result. float32 keeps 24 bits, 6e-8; sums of some hundred terms in
    # another order, and the reference's value × scale rounded where kernels scale whole blocks, cost a few tens of it.
    "product": 3e-6,
    # Integer products are exact: what is left is the order in which tens of blocks are added.
    "integer product": 1e-6,
    # Rounding to int8 a second time, behind a gate: where the last bit turns it, an activation moves by one step, 1/127
    # of its block's largest, and is one term of many.
    "rounded again": 1e-2,
    # A handful of roundings, square root and division among them.
    "norm": 1e-6,
    # exp is good to 2 units in the last place, and one division follows.
    "gate": 1e-6,
    # Scores are sums over the head's dimensions, and exp makes of their absolute errors relative ones.
    "attention": 1e-5,
    # Keys are rotated in float32 with or without fma: where that flips the rounding to bfloat16 a key's element moves
    # by 2^-8 of itself.
    "bfloat16 cache": 4e-3,
    # The same for steps of 1/127 of the row's largest element.
    "int8 cache": 1e-2,
}
"""How far compiled results may be from the reference, and why."""


@dataclass(frozen=True)
class Mxfp4:
    """Random codes and powers of two in the shape of a tensor and about its size; what is written here is not read."""

    codes: Any  # (rows, columns) of values
    powers: Any  # (rows, columns / 32) uint8

    @classmethod
    def of(cls, values: Any) -> "Mxfp4":
        """Powers differ from one half of a block to the other; codes are the nearest ones but for the largest."""
        blocks = values.reshape(len(values), -1, 32)
        powers = np.frexp(np.abs(blocks).max(axis=2))[1] - 3 + (np.arange(blocks.shape[1]) % 3)
        relative = blocks / np.ldexp(np.float32(1), powers)[:, :, None]
        codes = np.abs(relative[..., None] - mxfp4.CODE).argmin(axis=3).astype(np.uint8)
        return cls(codes.reshape(values.shape), (powers + 127).astype(np.uint8))

    @property
    def scales(self) -> Any:
        return np.ldexp(np.float32(1), self.powers.astype(np.int32) - 127)

    @property
    def high_first(self) -> Any:
        return self.codes[:, ::2] << 4 | self.codes[:, 1::2]


@dataclass(frozen=True)
class Held:
    """A whole tensor in the format that it is held in."""

    form: str
    stored: Any

    @classmethod
    def of(cls, values: Any, form: str) -> "Held":
        """`values` float32, any shape, in a format."""
        if form in ("nf4", "nf4-single"):
            return cls(form, nf4.quantize(values, nested=form == "nf4"))
        if form == "int8":
            return cls(form, int8.quantize(values))
        if form == "mxfp4":
            return cls(form, Mxfp4.of(values))
        return cls(form, floats.convert(np.ascontiguousarray(values, np.float32), DTYPES[form]))

    def values(self) -> Any:
        """What the reference reads."""
        if self.form in DTYPES:
            return floats.to_float32(self.stored)
        if self.form == "mxfp4":
            return MatrixValues.mxfp4(self.stored.codes, self.stored.scales, mxfp4.CODE)
        rows = self.stored.shape[0]
        if self.form == "int8":
            return MatrixValues.int8(self.stored.values, self.stored.scales)
        codes = np.stack([self.stored.codes >> 4, self.stored.codes & 15], 1).reshape(rows, -1)
        return MatrixValues.nf4(codes, self.stored.scales().reshape(rows, -1), self.stored.code)

    def source(self, weight: Weight) -> Source:
        """The slice of it that a rank packs."""
        rows = slice(weight.rows.start, weight.rows.stop)
        columns, form = weight.columns, FORMS[self.form]

        def part(array: Any, unit: int) -> Any:
            return array.reshape(weight.full_rows, -1)[rows, columns.start // unit : columns.stop // unit]

        if self.form in DTYPES:
            return Source(form, part(self.stored, 1))
        if self.form == "int8":
            return Source(form, part(self.stored.values, 1), part(self.stored.scales, BLOCK))
        if self.form == "mxfp4":
            codes, scales = part(self.stored.high_first, 2), part(self.stored.powers, BLOCK // R.HALVES)
            return Source(form, codes, scales, codebook="mxfp4")
        codes, scales = part(self.stored.codes, 2), part(self.stored.absmax, BLOCK)
        if self.form == "nf4-single":
            return Source(form, codes, scales.view(np.float32))
        used = (weight.rows * (weight.full_columns // BLOCK)).blocks(256)
        groups = self.stored.nested_absmax[used.start : used.stop].copy()
        return Source(form, codes, scales, groups, used.start, self.stored.nested_code, float(self.stored.offset))


class FakeModel(Builder):
    """A builder that makes up the values of what it declares."""

    def __init__(self, seed: int = 0, share: Share | None = None) -> None:
        super().__init__(share or Share())
        self.random = np.random.default_rng(seed)
        self.tensors: dict[str, Held] = {}

    def inputs(self, values: Any, form: str = "float32") -> Buffer:
        """A buffer whose row for token t is `values[t]`."""
        name = f"inputs{len(self.tensors)}"
        self.tensors[f"{name}.weight"] = Held.of(values, form)
        return self.embed(name, *values.shape)

    def normal(self, *shape: int) -> Any:
        return self.random.standard_normal(shape, dtype=np.float32)

    def hold(self, matrix: Any, form: str, values: Any = None) -> Any:
        """Gives a declared matrix its values, random ones by default, and its bias random ones."""
        weight, bias = matrix
        if values is None:
            values = self.normal(*weight.full_shape) / np.float32(weight.full_columns**0.5)
        self.tensors[weight.name] = Held.of(values, form)
        if bias is not None:
            self.tensors[bias.name] = Held.of(self.normal(*bias.full_shape), "float32")
        return matrix

    def result(self, x: Buffer) -> Program:
        """Finishes with logits that are `x`."""
        self.tensors["identity.weight"] = Held.of(np.eye(x.width, dtype=np.float32), "float32")
        self.logits(x, "identity", x.width)
        return self.finish()


class Bound:
    """A program in compiled form, with a cache of its own."""

    def __init__(
        self, program: Program, tensors: Mapping[str, Held], team: Team, *, exact: bool = False, tokens: int = 64,
        context: int = 64, page_tokens: int = 16, sequences: int = 3, kv: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        packed = [w for w in program.weights if w.kind not in (Kind.VECTOR, Kind.EMBEDDING)]
        sizes = [packed_bytes(len(w.rows), len(w.columns), FORMS[tensors[w.name].form]) for w in packed]
        self.arena = arena(sum(sizes))
        prepare(packing_kernels(FORMS[tensors[weight.name].form] for weight in packed))
        packer = Packer(team, self.arena)
        self.weights: dict[Key, Packed | Table | Vector] = {}
        for weight in program.weights:
            held = tensors[weight.name]
            if weight.kind is Kind.EMBEDDING:
                value: Any = Table(held.stored, FORMS[held.form])
            elif weight.kind is Kind.VECTOR:
                value = padded(floats.to_float32(held.stored)[weight.rows.start : weight.rows.stop])
            else:
                value = packer.pack(weight, held.source(weight))
            self.weights[weight.key] = value
        held = KV_FORMATS[kv or ("float32" if exact else "bf16")]
        self.cache = Cache(program, context=context, page_tokens=page_tokens, sequences=sequences, kv=held)
        self.sequences = [self.cache.begin() for _ in range(sequences)]
        self.compiled = Compiled(
            program, self.weights, self.cache.memory, team, exact=exact, tokens=tokens, wanted=tokens, **settings
        )

    def run(self, *parts: tuple[Sequence[int], int, int], wanted: Iterable[int] | None = None) -> Any:
        """Each part: (tokens, position of the first, number of the sequence). Logits of all, or the wanted, tokens."""
        rows = []
        for tokens, position, number in parts:
            sequence = self.sequences[number]
            self.cache.reserve(sequence, position + len(tokens))
            rows.append(([int(token) for token in tokens], position, sequence.state, sequence.pages))
        count = sum(len(tokens) for tokens, *_ in rows)
        batch = Batch.build(rows, list(range(count)) if wanted is None else list(wanted), **EVERYTHING)
        return self.compiled.run(batch).copy()


def reference(program: Program, tensors: Mapping[str, Held], exact: bool, **settings: Any) -> Reference:
    """The reference over the same values."""
    arithmetic = "exact" if exact else "int8"
    return Reference([program], lambda weight: tensors[weight.name].values(), arithmetic=arithmetic, **settings)


def expected(reader: Reference, *parts: tuple[Sequence[int], int, int]) -> Any:
    """What the reference gives for the parts of `Bound.run`."""
    tokens = [token for part, *_ in parts for token in part]
    positions = [first + i for part, first, _ in parts for i in range(len(part))]
    sequences = [number for part, _, number in parts for _ in part]
    return reader.run(tokens, positions, sequences, range(len(tokens)))


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    """Every token's largest error is within `tolerance` of its largest value, or of what is usual where a token's few
    values happen to cancel; a token of zeros is exactly that."""
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    error = np.abs(got - wanted).max(axis=1, initial=0)
    largest = np.abs(wanted).max(axis=1, initial=0)
    scale = np.where(largest > 0, np.maximum(largest, np.median(largest)), 0)
    worst = int((error - tolerance * scale).argmax()) if len(error) else 0
    assert (error <= tolerance * scale).all(), f"token {worst}: error {error[worst]} of {scale[worst]}"


def same_bits(one: Any, other: Any) -> bool:
    """Whether two float32 arrays are equal bit for bit."""
    return one.shape == other.shape and bool((one.view(np.uint32) == other.view(np.uint32)).all())


class FakeRanks:
    """Stands for MPI where a step calls it by address: other ranks' parts are made of this rank's own.

    `part(number, values)` gives what rank `number` sends when this rank, rank 0, sends `values`.
    """

    def __init__(self, size: int, part: Any = lambda _, values: values) -> None:
        self.calls: list[int] = []

        def gather(send: int, count: int, _type: int, receive: int, _count: int, _same: int, _ranks: int) -> int:
            values = floats_at(send, count)
            for number in range(size):
                floats_at(receive + 4 * count * number, count)[:] = part(number, values)
            self.calls.append(count)
            return 0

        def reduce(send: int, receive: int, count: int, *_: int) -> int:
            values = floats_at(send, count)
            floats_at(receive, count)[:] = sum(part(number, values) for number in range(size))
            self.calls.append(count)
            return 0

        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 7)
        self._functions = prototype(gather), prototype(reduce)
        addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._functions]
        self.ordered = AllReduce("ordered", addresses[0], (0, 0))
        self.mpi = AllReduce("mpi", addresses[1], (0, 0, 0))


def floats_at(address: int, count: int) -> Any:
    """A view of `count` float32 in memory."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


def check(model: "FakeModel", program: Any, teams: Any, exact: bool, tolerance: float | None = None) -> Any:
    """As all teams have it, in every bit the same beside other tokens; within the tolerance of the reference."""
    reader = reference(program, model.tensors, exact, dtype=np.float64 if exact else np.float32)
    bound = [Bound(program, model.tensors, team, exact=exact) for team in teams]
    tolerance = tolerance or TOLERANCES["product" if exact else "rounded again"]
    most = None
    for count in (64, 1, 2, 9, 50):
        part = (range(count), 0, 0)
        results = [each.run(part) for each in bound]
        assert all(same_bits(result, results[0]) for result in results), f"{count} tokens"
        most = results[0] if most is None else most
        assert same_bits(results[0], most[:count]), f"{count} tokens"
        assert_close(results[0], expected(reader, part), tolerance)
    return most
