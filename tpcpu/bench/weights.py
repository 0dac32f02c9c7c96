"""Bytes and multiplications of the weights that a rank holds, by the formats that they are held in."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tpcpu.kernels import record as R
from tpcpu.program import cost
from tpcpu.program.operations import BLOCK, Kind, Weight
from tpcpu.program.weights import Packed

_NAMES = {
    R.NF4: "nf4", R.INT8: "int8", R.MXFP4: "mxfp4", R.BF16: "bf16", R.F16: "float16", R.FLOAT32: "float32",
}  # fmt: skip
_NF4 = (R.NF4, R.NF4_SINGLE)


@dataclass(frozen=True)
class Tally:
    """Sums over weights; ranks' tallies add up."""

    token_bytes: int = 0
    """Read for a token."""
    held_bytes: int = 0
    """In memory, rows that fill up a panel included."""
    nf4_bytes: int = 0
    nf4_weights: int = 0
    products: int = 0
    """Weights that every token of a prompt is multiplied with,"""
    head_products: int = 0
    """and those that only the last one is."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    @property
    def bits_per_nf4_weight(self) -> float | None:
        return 8 * self.nf4_bytes / self.nf4_weights if self.nf4_weights else None


def _values(tally: Tally) -> tuple[int, ...]:
    return tuple(vars(tally).values())


def token_bytes(packed: Packed) -> int:
    """Bytes of one weight, scales included, as the plan counts them."""
    if packed.form == R.NF4_SINGLE:
        return packed.weight.size // 2 + 4 * packed.weight.size // BLOCK
    return cost.weight_bytes(packed.weight, _NAMES[packed.form])


def tally(weights: Iterable[object], unread: Collection[Weight] = ()) -> Tally:
    """Of the packed ones among them; all but those `unread` are multiplied for a token."""
    return sum((_of(each, each.weight not in unread) for each in weights if isinstance(each, Packed)), Tally())


def _of(packed: Packed, read: bool) -> Tally:
    weight: Weight = packed.weight
    nbytes, nf4, head = token_bytes(packed), packed.form in _NF4, weight.kind is Kind.HEAD
    return Tally(
        token_bytes=nbytes if read else 0,
        held_bytes=packed.nbytes,
        nf4_bytes=nbytes if nf4 else 0,
        nf4_weights=weight.size if nf4 else 0,
        products=weight.size if read and not head else 0,
        head_products=weight.size if head else 0,
    )
