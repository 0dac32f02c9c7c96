"""NF4 with double quantisation, as bitsandbytes publishes it: the specification, in numpy.

A tensor is flattened row-major and cut into blocks of 64. Each value becomes one of 16 codes, relative to the largest
magnitude of its block; two codes share a byte, the first in the high nibble. The block maxima, less their mean (the
offset), become one of 256 codes relative to the largest of a group of 256 blocks.

Read, and never written, are its other 4-bit tensors: FP4, the same with 16 other values, and other block sizes. Where
blocks hold several times 64 values, each block's scale is repeated, and each group's too: that is the same tensor in
blocks of 64, to the bit, and nothing behind this module knows the difference.

Bit for bit what bitsandbytes 0.50.2 computes on a CPU, in both directions, given the offset. The offset is our own: the
mean of the block maxima summed in float64 and rounded once, where theirs is a float32 mean whose last bit follows the
number of threads.

Knows the arithmetic and the names of the parts of a stored tensor. Knows nothing of files; the compiled quantiser
(`kernels/quantize.py`) is tested against this.
"""

import json
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcpu.errors import CheckpointError
from tpcpu.formats.floats import FLOATS, Array, to_float32
from tpcpu.formats.tables import DYNAMIC_MAP, FP4_CODE, NEAREST_CODE, NF4_CODE, NF4_MIDPOINTS

BLOCK = 64
GROUP = 256  # blocks that share one float32 scale
SMALLEST = np.float32(1e-38)  # bitsandbytes divides by no less

STATE_KEY = "quant_state.bitsandbytes__nf4"
STATE_KEYS = {"nf4": STATE_KEY, "fp4": "quant_state.bitsandbytes__fp4"}
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has


@dataclass(frozen=True, eq=False)
class Nf4Tensor:
    """One tensor in NF4, or FP4. Blocks: `ceil(elements / block)`; groups: `ceil(blocks / 256)`, at least.

    Without double quantisation (`nested` false) `absmax` is float32 and the three nested parts are empty or zero.
    """

    shape: tuple[int, ...]
    codes: npt.NDArray[np.uint8]  # (ceil(elements / 2),), first value in the high nibble
    absmax: Array  # (blocks,) uint8 codes of the scales; float32 scales where not nested
    nested_absmax: npt.NDArray[np.float32]  # (groups,)
    offset: np.float32
    code: npt.NDArray[np.float32]  # (16,)
    nested_code: npt.NDArray[np.float32]  # (256,)
    dtype: str  # of the values before quantising: bfloat16, float16 or float32
    kind: str = "nf4"  # or fp4
    block: int = BLOCK  # or 32: what is stored in larger blocks is in blocks of 64 here

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too."""
        return self.absmax.dtype == np.uint8

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the tensor: codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes + self.nested_absmax.nbytes

    def scales(self) -> npt.NDArray[np.float32]:
        """The scale of each block, (blocks,) float32: code × group scale, rounded, plus offset, rounded. Not fused."""
        if not self.nested:
            given: npt.NDArray[np.float32] = self.absmax
            return given
        groups = np.repeat(self.nested_absmax, GROUP)[: self.absmax.size]
        product: npt.NDArray[np.float32] = self.nested_code[self.absmax] * groups
        return product + self.offset


def block_maxima(values: Array) -> npt.NDArray[np.float32]:
    """Largest magnitude of each block of 64 of the flattened `values`, float32; at least 1e-38 for a short last one."""
    flat = np.abs(to_float32(values.reshape(-1)))
    full = flat.size // BLOCK * BLOCK
    maxima: npt.NDArray[np.float32] = flat[:full].reshape(-1, BLOCK).max(axis=1, initial=0)
    if full == flat.size:
        return maxima
    return np.append(maxima, np.maximum(flat[full:].max(), SMALLEST))


def scale_offset(maxima: npt.NDArray[np.float32]) -> np.float32:
    """The offset of the scales: the mean of all block maxima of the tensor, summed in float64, rounded once."""
    return np.float32(maxima.sum(dtype=np.float64) / maxima.size) if maxima.size else np.float32(0)


def quantize_scales(
    maxima: npt.NDArray[np.float32], offset: np.float32
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Scale codes (blocks,) uint8 and group scales (groups,) float32 of whole groups of block maxima."""
    one, half, steps = np.float32(1), np.float32(0.5), np.float32(32767.5)
    rest = np.zeros((-(-maxima.size // GROUP), GROUP), np.float32)
    np.subtract(maxima, offset, out=rest.reshape(-1)[: maxima.size])
    groups = np.abs(rest).max(axis=1, initial=0)
    # a group of equal scales has nothing to divide by: bitsandbytes gives it code 0, and so does the zero put for NaN
    # here
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.clip(rest * (one / groups)[:, None], -one, one)
    index = np.nan_to_num((relative + one) * steps + half, nan=0.0).astype(np.int64)
    return NEAREST_CODE[index].reshape(-1)[: maxima.size], groups


def quantize_codes(values: Array, maxima: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Packed codes, (ceil(elements / 2),) uint8, of the flattened `values` given the maxima of their blocks."""
    flat = to_float32(values.reshape(-1))
    full = flat.size // BLOCK * BLOCK
    with np.errstate(over="ignore"):
        inverse = np.float32(1) / np.maximum(maxima[: full // BLOCK], SMALLEST)
        relative = np.empty(flat.size, np.float32)
        np.multiply(flat[:full].reshape(-1, BLOCK), inverse[:, None], out=relative[:full].reshape(-1, BLOCK))
        if full < flat.size:
            np.divide(flat[full:], maxima[-1], out=relative[full:])
    codes = np.searchsorted(NF4_MIDPOINTS, relative, side="left").astype(np.uint8)
    if codes.size % 2:
        codes = np.append(codes, np.uint8(np.searchsorted(NF4_MIDPOINTS, 0.0)))
    packed: npt.NDArray[np.uint8] = (codes[0::2] << np.uint8(4)) | codes[1::2]
    return packed


def quantize(values: Array, *, nested: bool = True, offset: np.float32 | None = None) -> Nf4Tensor:
    """`values` (any shape; bfloat16, float16 or float32, all finite) in NF4.

    `offset` replaces our own, so that a tensor can be compared with one that other software wrote.
    """
    name = next((name for name, dtype in FLOATS.items() if dtype == values.dtype), None)
    if name is None:
        raise CheckpointError(f"NF4 is made from {', '.join(FLOATS)}, not from {values.dtype}")
    maxima = block_maxima(values)
    codes = quantize_codes(values, maxima)
    if not nested:
        none = np.zeros(0, np.float32)
        return Nf4Tensor(values.shape, codes, maxima, none, np.float32(0), NF4_CODE, none, name)
    offset = scale_offset(maxima) if offset is None else np.float32(offset)
    scale_codes, groups = quantize_scales(maxima, offset)
    return Nf4Tensor(values.shape, codes, scale_codes, groups, offset, NF4_CODE, DYNAMIC_MAP, name)


def dequantize(tensor: Nf4Tensor) -> npt.NDArray[np.float32]:
    """The values, `tensor.shape` float32. (bitsandbytes rounds these once more where its state says a 16-bit dtype.)"""
    elements = math.prod(tensor.shape)
    codes = np.empty(2 * tensor.codes.size, np.uint8)
    codes[0::2] = tensor.codes >> 4
    codes[1::2] = tensor.codes & 15
    values = tensor.code[codes[:elements]]
    full = elements // tensor.block * tensor.block
    scales = tensor.scales()
    values[:full].reshape(-1, tensor.block)[...] *= scales[: full // tensor.block, None]
    if full < elements:
        values[full:] *= scales[-1]
    return values.reshape(tensor.shape)


def pack_state(shape: tuple[int, ...], dtype: str, offset: np.float32 | None) -> npt.NDArray[np.uint8]:
    """The JSON part of a stored tensor as bytes, uint8; `offset` None: scales are not quantised."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    if offset is not None:
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": float(offset)}
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def to_tensors(name: str, tensor: Nf4Tensor) -> dict[str, Array]:
    """The stored parts of the tensor called `name` (`….weight`), in the published layout."""
    parts: dict[str, Array] = {name: tensor.codes.reshape(-1, 1), f"{name}.absmax": tensor.absmax}
    if tensor.nested:
        parts[f"{name}.nested_absmax"] = tensor.nested_absmax
        parts[f"{name}.nested_quant_map"] = tensor.nested_code
    parts[f"{name}.quant_map"] = tensor.code
    parts[f"{name}.{STATE_KEY}"] = pack_state(tensor.shape, tensor.dtype, tensor.offset if tensor.nested else None)
    return parts


def is_stored(name: str, names: Container[str]) -> bool:
    """Whether `name` is stored in a 4-bit format of bitsandbytes, also where parts of it are missing."""
    return any(part in names for part in part_names(name))


def part_names(name: str) -> tuple[str, ...]:
    """The names that may accompany `name` in a file."""
    suffixes = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", *STATE_KEYS.values())
    return tuple(f"{name}.{suffix}" for suffix in suffixes)


@dataclass(frozen=True)
class State:
    """What a stored tensor says about itself; `block` as stored."""

    kind: str
    shape: tuple[int, ...]
    block: int
    nested: bool
    offset: float
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.elements // self.block)


def read_state(name: str, get: Callable[[str], Array], names: Container[str]) -> State:
    """The state of the tensor called `name`. Raises CheckpointError naming tensor and fault."""
    kinds = [kind for kind, key in STATE_KEYS.items() if f"{name}.{key}" in names]
    if len(kinds) != 1:
        found = "two of them" if kinds else "none: it is not stored in 4 bits"
        raise CheckpointError(f"tensor {name}: expected one {' or '.join(STATE_KEYS.values())}, found {found}")
    return _checked_state(f"tensor {name}.{STATE_KEYS[kinds[0]]}", kinds[0], get(f"{name}.{STATE_KEYS[kinds[0]]}"))


def from_tensors(name: str, get: Callable[[str], Array], names: Container[str]) -> Nf4Tensor:
    """Read the tensor called `name` from its stored parts; `get` returns one, `names` has all of the checkpoint.

    Raises CheckpointError naming tensor and fault: an unknown 4-bit type or block size, parts missing or of wrong
    size.
    """
    state = read_state(name, get, names)
    wanted = (state.elements + 1) // 2
    # other containers than uint8 are possible (quant_storage); the bytes are the same
    codes = np.ascontiguousarray(get(name)).reshape(-1).view(np.uint8)
    if codes.size != wanted:
        raise CheckpointError(
            f"tensor {name}: shape {list(state.shape)} needs {wanted} bytes of 4-bit codes, found {codes.size}"
        )

    def part(suffix: str, dtype: type[np.generic], size: int) -> Array:
        full = f"{name}.{suffix}"
        if full not in names:
            raise CheckpointError(f"tensor {name}: its part {full} is missing")
        array = get(full).reshape(-1)
        if array.dtype != dtype or array.size != size:
            raise CheckpointError(
                f"tensor {full}: found {array.size} values of {array.dtype}, expected {size} of {np.dtype(dtype)}"
            )
        return array

    code = part("quant_map", np.float32, 16)
    if not np.array_equal(code, CODES[state.kind]):
        # Kernels have the published values built in.
        raise CheckpointError(
            f"tensor {name}.quant_map does not hold the 16 values of {state.kind.upper()}; quantise the model anew"
        )
    absmax = part("absmax", np.uint8 if state.nested else np.float32, state.blocks)
    groups = nested_code = np.zeros(0, np.float32)
    if state.nested:
        groups = part("nested_absmax", np.float32, -(-state.blocks // GROUP))
        nested_code = part("nested_quant_map", np.float32, 256)
    absmax, groups = in_blocks_of_64(state, absmax), in_blocks_of_64(state, groups)
    return Nf4Tensor(
        state.shape, codes, absmax, groups, np.float32(state.offset), CODES[state.kind], nested_code, state.dtype,
        state.kind, min(state.block, BLOCK),
    )  # fmt: skip


def in_blocks_of_64(state: State, scales: Array) -> Array:
    """The scales of all blocks, or of all groups, of a tensor in larger blocks, as if it were in blocks of 64."""
    times = state.block // BLOCK
    return np.repeat(scales, times)[: -(-state.elements // BLOCK)] if times > 1 else scales


def _checked_state(where: str, kind: str, packed: Array) -> State:
    if packed.dtype != np.uint8 or packed.size > 4096:
        raise CheckpointError(
            f"{where}: found {packed.size} values of {packed.dtype}, expected a short JSON text as uint8"
        )
    try:
        state = json.loads(bytes(packed))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    expected: dict[str, Any] = {"quant_type": (kind,), "blocksize": _BLOCKS, "dtype": tuple(FLOATS)}
    if "nested_offset" in state:
        expected |= {"nested_blocksize": (GROUP,), "nested_dtype": ("float32",)}
    for key, values in expected.items():
        if type(state.get(key)) is not type(values[0]) or state[key] not in values:
            known = ", ".join(map(repr, values))
            raise CheckpointError(f"{where}: {key} is {state.get(key)!r}; known: {known}")
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or not all(type(size) is int and 0 <= size < 2**48 for size in shape)
    ):
        raise CheckpointError(f"{where}: shape is {shape!r}, expected a list of sizes")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset) or abs(offset) > 3.4e38:
        raise CheckpointError(f"{where}: nested_offset is {offset!r}, expected a finite float32")
    return State(kind, tuple(shape), state["blocksize"], "nested_offset" in state, offset, state["dtype"])
