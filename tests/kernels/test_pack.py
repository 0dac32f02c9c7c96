"""Packing against a statement of the layout in numpy: every format, shares that end anywhere, teams of any size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.kernels.pack import PIECE_BYTES, ROWS, WEIGHT_BIAS
from tpcpu.parallel.numa import arena
from tpcpu.parallel.partition import Range
from tpcpu.parallel.team import Team
from tpcpu.program.operations import Kind, Weight
from tpcpu.program.weights import ELEMENT_BYTES, Packer, Source, packed_bytes, packing_kernels

FORMS = {"nf4": R.NF4, "nf4-single": R.NF4_SINGLE, "int8": R.INT8, "bf16": R.BF16, "f16": R.F16, "float32": R.FLOAT32}
SHAPES = ((1, 64), (16, 128), (17, 192), (100, 704), (64, 2048), (35, 4160))
"""Rows that fill the last panel or do not; odd and even numbers of blocks."""


def panels(parts: Any) -> Any:
    """(rows, parts, bytes) as bytes: of each part, the rows of a panel together, zeros for rows that are not there."""
    rows, count, size = parts.shape
    held = np.zeros((-(-rows // ROWS) * ROWS, count, size), np.uint8)
    held[:rows] = parts
    return held.reshape(-1, ROWS, count, size).transpose(0, 2, 1, 3).reshape(-1)


def expected(form: int, values: Any) -> Any:
    """What lies in memory, of the published layout `values` (rows, bytes) uint8."""
    rows, row_bytes = values.shape
    if form in ELEMENT_BYTES:
        return panels(values.reshape(rows, -1, ELEMENT_BYTES[form]))
    if ROWS == 1:
        return values.reshape(-1)
    if form == R.INT8:
        # The bias is wrapped: rows that are not there are zeros before it is added.
        return panels(values.reshape(rows, -1, 4)) + np.uint8(WEIGHT_BIAS)
    features = np.stack([values >> 4, values & 15], 2).reshape(rows, row_bytes // 4, 8)
    return panels(features[:, :, :4] | features[:, :, 4:] << 4)


def source_of(form: int, values: Any, rng: Any, mapped: bool = False) -> tuple[Source, Weight]:
    """Random scales beside the values; the weight's shape follows from them."""
    rows, row_bytes = values.shape
    columns = row_bytes // ELEMENT_BYTES[form] if form in ELEMENT_BYTES else row_bytes * (1 if form == R.INT8 else 2)
    weight = Weight("w", Kind.MATRIX, (rows, columns), Range(0, rows), Range(0, columns))
    if form in ELEMENT_BYTES:
        dtype = {1: np.uint8, 2: np.uint16, 4: np.float32}[ELEMENT_BYTES[form]]
        return Source(form, values.view(dtype), mapped=mapped), weight
    scales = rng.integers(0, 256, (rows, columns // 64 * (1 if form == R.NF4 else 4)), np.uint8)
    if form == R.NF4:
        groups = np.ones(rows * columns // 64 // 256 + 1, np.float32)
        return Source(form, values, scales, groups, 0, np.zeros(256, np.float32), 0.0, mapped), weight
    return Source(form, values, scales.view(np.float32), mapped=mapped), weight


def check(team: Team, source: Source, weight: Weight) -> None:
    """Packs over memory of ones, and compares all of it, and what lies behind it."""
    prepare(packing_kernels([source.form]))
    size = packed_bytes(len(weight.rows), len(weight.columns), source.form)
    memory = arena(size + 64)
    held = np.asarray(memory)
    held[:] = 0xA5
    packed = Packer(team, memory).pack(weight, source)
    values = np.ascontiguousarray(source.values).view(np.uint8)
    wanted = expected(source.form, values)
    start = int(packed.segment[R.S_VALUES]) - memory.address
    assert np.array_equal(held[start : start + wanted.size], wanted)
    end = start + wanted.size
    if source.scales is not None:
        each = source.scales.itemsize
        scales = np.ascontiguousarray(source.scales).view(np.uint8).reshape(*source.scales.shape, each)
        wanted = panels(scales)
        at = int(packed.segment[R.S_SCALES]) - memory.address
        assert end <= at < end + 64
        assert np.array_equal(held[at : at + wanted.size], wanted)
        end = at + wanted.size
    assert (held[end:] == 0xA5).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout(teams, form, shape):
    rng = np.random.default_rng(1)
    rows, columns = shape
    row_bytes = columns * ELEMENT_BYTES[form] if form in ELEMENT_BYTES else columns // (1 if form == R.INT8 else 2)
    for team in teams:
        values = rng.integers(0, 256, (rows, row_bytes), np.uint8)
        check(team, *source_of(form, values, rng))
        # A share of the columns of something wider, on an odd address.
        wide = rng.integers(0, 256, rows * (row_bytes + 96) + 1, np.uint8)[1:].reshape(rows, -1)
        if form not in ELEMENT_BYTES:
            check(team, *source_of(form, wide[:, 32 : 32 + row_bytes], rng))


@pytest.mark.parametrize("columns", [1, 3, 62, 65, 172])
@pytest.mark.parametrize("form", list(ELEMENT_BYTES), ids=["bf16", "f16", "float32"])
def test_floats_of_any_width(teams, form, columns):
    rng = np.random.default_rng(2)
    for rows in (5, 32, 33):
        values = rng.integers(0, 256, (rows, columns * ELEMENT_BYTES[form]), np.uint8)
        check(teams[1], *source_of(form, values, rng))


def resident(path: Path) -> int:
    """Bytes of the file that this process has mapped and touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


@pytest.mark.parametrize("form", [R.NF4, R.INT8, R.BF16], ids=["nf4", "int8", "bf16"])
def test_a_mapped_file_is_given_back_piece_by_piece(teams, tmp_path, form):
    """The pages go, the bytes stay: what was packed is right, and reading again finds the file."""
    rng = np.random.default_rng(3)
    row_bytes = 4096 + 64
    rows = 3 * PIECE_BYTES // row_bytes + 5
    data = rng.integers(0, 256, rows * row_bytes + 64, np.uint8)
    path = tmp_path / "values"
    data.tofile(path)
    values = np.memmap(path, np.uint8, "r")[64:].reshape(rows, row_bytes)
    source, weight = source_of(form, values, rng, mapped=True)
    prepare(packing_kernels([form]))
    for team in teams:
        memory = arena(packed_bytes(len(weight.rows), len(weight.columns), form))
        assert values.sum(dtype=np.int64) > 0
        assert resident(path) >= values.nbytes
        Packer(team, memory).pack(weight, source)
        assert resident(path) < 1 << 20
        assert np.array_equal(np.asarray(memory)[: (rows // ROWS * ROWS) * row_bytes],
                              expected(form, data[64:].reshape(rows, row_bytes)[: rows // ROWS * ROWS]))  # fmt: skip
    assert np.array_equal(values, data[64:].reshape(rows, row_bytes))
