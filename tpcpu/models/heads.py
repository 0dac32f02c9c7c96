"""How attention heads are divided over ranks, and attention over them as most families have it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tpcpu.parallel.partition import Range, Share
from tpcpu.program.builder import Builder, Matrix
from tpcpu.program.operations import Buffer, Heads, Weight
from tpcpu.program.rope import Rope


@dataclass(frozen=True)
class HeadSplit:
    """A rank's query heads, and those key/value heads that they read; `heads` is a multiple of `kv_heads`."""

    share: Share
    heads: int
    kv_heads: int
    dim: int

    @property
    def local(self) -> Range:
        """This rank's query heads."""
        return self.share.split(self.heads)

    @property
    def local_kv(self) -> Range:
        """The key/value heads that these read, which other ranks may hold too."""
        return self.local.blocks(self.heads // self.kv_heads)

    @cached_property  # one for all layers
    def kv_of(self) -> tuple[int, ...]:
        """For each query head the key/value head that it reads, counted among this rank's."""
        group, first = self.heads // self.kv_heads, self.local_kv.start
        return tuple(head // group - first for head in range(self.local.start, self.local.stop))

    @property
    def rows(self) -> tuple[Range, Range, Range]:
        """This rank's rows of q, k and v."""
        return self.local * self.dim, self.local_kv * self.dim, self.local_kv * self.dim

    @property
    def full_rows(self) -> tuple[int, int, int]:
        """All rows of q, k and v."""
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim

    def packed(self, p: Builder, module: str, columns: int, bias: bool = False) -> dict[str, Matrix]:
        """q, k and v of one tensor that holds all rows of q, then those of k, then those of v."""
        sections = zip("qkv", zip(self.full_rows, self.rows, strict=True), strict=True)
        return packed(p, module, columns, dict(sections), bias)

    def attend(
        self, p: Builder, q: Buffer, k: Buffer, v: Buffer, rope: Rope, scale: float, *, window: int = 0,
        norms: Sequence[Weight] = (), eps: float = 0.0, cap: float = 0.0, slopes: Sequence[float] = (),
        sinks: str = "",
    ) -> Buffer:  # fmt: skip
        """Attention of projected q, k and v; `norms` of each head of q and of k; `slopes` of all heads; `sinks`: the
        tensor that has one score more of each head."""
        heads, kv_heads, dim = len(self.local), len(self.local_kv), self.dim
        rotated = p.rope_and_store(
            Heads(q, heads, dim, 0, dim), Heads(k, kv_heads, dim, 0, dim), Heads(v, kv_heads, dim, 0, dim), rope,
            norms, eps,
        )  # fmt: skip
        slopes = slopes[self.local.start : self.local.stop]
        sink = p.vector(sinks, self.heads, self.local) if sinks else None
        return p.attention(
            rotated, self.local, self.heads, self.kv_of, scale, window, cap=cap, slopes=slopes, sinks=sink
        )


def packed(
    p: Builder, module: str, columns: int, sections: dict[str, tuple[int, Range]], bias: bool = False
) -> dict[str, Matrix]:
    """Matrices of one tensor that holds their rows one after another: for each, by name, all rows and this rank's."""
    total, first, matrices = sum(full for full, _ in sections.values()), 0, {}
    for name, (full, rows) in sections.items():
        matrices[name] = p.matrix(module, (total, columns), rows=rows + first, bias=bias, section=name)
        first += full
    return matrices
