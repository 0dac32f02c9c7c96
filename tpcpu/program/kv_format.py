"""The formats that keys and values are held in, and the bytes that they take. Knows nothing of pages' places."""

from dataclasses import dataclass

from tpcpu.kernels import record as R
from tpcpu.program.operations import KvShape


@dataclass(frozen=True)
class KvFormat:
    """How elements of keys and values are held; `form` is the kernels' number of it."""

    name: str
    form: int
    element_bytes: int
    scale_bytes: int = 0
    """Of each head and token, beside its elements."""

    def row_bytes(self, dim: int) -> int:
        """A key or a value of one head and token."""
        return dim * self.element_bytes + self.scale_bytes

    def page_bytes(self, shape: KvShape, page_tokens: int) -> int:
        """A page's keys, or its values."""
        return shape.heads * page_tokens * self.row_bytes(shape.head_dim)


KV_FORMATS = {
    each.name: each
    for each in (
        KvFormat("float32", R.FLOAT32, 4), KvFormat("bf16", R.BF16, 2), KvFormat("int8", R.INT8, 1, scale_bytes=4)
    )
}  # fmt: skip
