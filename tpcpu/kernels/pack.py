"""From the published layout of a weight to the one that kernels read: panels of rows, see `linear.py`.

Threads divide the panels, so that each writes first what its socket will read. Rows behind the last are zero.
"""

from functools import cache

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper, kernel
from tpcpu.kernels.isa import selected
from tpcpu.kernels.memory import load_i32, load_i64, load_u8, load_u16, store_i32, store_u8, store_u16
from tpcpu.kernels.simd import instructions

BLOCK = R.BLOCK
ROWS = selected().panel_rows
WEIGHT_BIAS = instructions.WEIGHT_BIAS if instructions else 0


@helper
def _word(record, word):
    return load_i64(record + 8 * word)


@helper
def _share(record, thread, threads):
    """The panels that this thread packs, and the rows that there are."""
    panels = (_word(record, R.P_ROWS) + ROWS - 1) // ROWS
    return panels * thread // threads, panels * (thread + 1) // threads


@kernel("pack-nf4")
def pack_nf4(record, thread, threads):
    """4-bit codes, two to a byte, the high half first; `P_ROW_BYTES` apart from row to row."""
    begin, end = _share(record, thread, threads)
    rows, blocks = _word(record, R.P_ROWS), _word(record, R.P_COLUMNS) // BLOCK
    out = _word(record, R.P_OUT) + begin * blocks * ROWS * (BLOCK // 2)
    for panel in range(begin, end):
        for block in range(blocks):
            for r in range(ROWS):
                row = panel * ROWS + r
                source = _word(record, R.P_SOURCE) + row * _word(record, R.P_ROW_BYTES) + block * (BLOCK // 2)
                for g in range(8):
                    # Features 0..7 of a group: 0 1 | 2 3 | 4 5 | 6 7 become 0 4 | 1 5 | 2 6 | 3 7, low half first.
                    codes = load_i32(source + 4 * g) if row < rows else 0
                    low, high = 0, 0
                    for j in range(4):
                        byte = (codes >> (8 * (j // 2))) & 255
                        low |= ((byte >> 4) if j % 2 == 0 else byte & 15) << (8 * j)
                        byte = (codes >> (16 + 8 * (j // 2))) & 255
                        high |= ((byte >> 4) if j % 2 == 0 else byte & 15) << (8 * j + 4)
                    store_i32(out + 4 * (g * ROWS + r), low | high)
            out += ROWS * (BLOCK // 2)


@kernel("pack-int8")
def pack_int8(record, thread, threads):
    begin, end = _share(record, thread, threads)
    rows, blocks = _word(record, R.P_ROWS), _word(record, R.P_COLUMNS) // BLOCK
    out = _word(record, R.P_OUT) + begin * blocks * ROWS * BLOCK
    for panel in range(begin, end):
        for block in range(blocks):
            for r in range(ROWS):
                row = panel * ROWS + r
                source = _word(record, R.P_SOURCE) + row * _word(record, R.P_ROW_BYTES) + block * BLOCK
                for g in range(BLOCK // 4):
                    for j in range(4):
                        value = load_u8(source + 4 * g + j) if row < rows else 0
                        store_u8(out + 4 * (g * ROWS + r) + j, value + WEIGHT_BIAS)
            out += ROWS * BLOCK


@cache
def pack_elements(size: int) -> Kernel:
    """Elements of `size` bytes, each column's rows of a panel together: floats, scales, and scale codes."""

    def pack_elements(record, thread, threads):
        begin, end = _share(record, thread, threads)
        rows, columns = _word(record, R.P_ROWS), _word(record, R.P_COLUMNS)
        out = _word(record, R.P_OUT) + begin * columns * ROWS * size
        for panel in range(begin, end):
            for column in range(columns):
                for r in range(ROWS):
                    row = panel * ROWS + r
                    source = _word(record, R.P_SOURCE) + row * _word(record, R.P_ROW_BYTES) + size * column
                    if size == 1:
                        store_u8(out + r, load_u8(source) if row < rows else 0)
                    elif size == 2:
                        store_u16(out + 2 * r, load_u16(source) if row < rows else 0)
                    else:
                        store_i32(out + 4 * r, load_i32(source) if row < rows else 0)
                out += ROWS * size

    return Kernel(pack_elements, f"pack-elements-{size}")
