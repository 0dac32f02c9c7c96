"""From the published layout of a weight to the one that kernels read: panels of rows, see `tiles.py`.

Every format is packed in the same way: the 4-byte words of a panel's rows are transposed, and each register of words
(one word of every row) is put in order for its format. Vector registers take squares of words; plain loops take what
is left over, and everything where there are no vector kernels.

Threads divide the panels, so that each writes first what its socket will read. Rows behind the last are zero. Where
the source is a mapped file, each thread maps a piece of it ahead of the reading, and gives it back behind.
"""

from functools import cache

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.isa import selected
from tpcpu.kernels.memory import I8, I16, load_i32, load_i64, load_u8, load_u16, store_i32, store_u8, store_u16
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions
from tpcpu.kernels.simd.transpose import shuffle, transpose

BLOCK = R.BLOCK
ROWS = selected().panel_rows
WEIGHT_BIAS = instructions.WEIGHT_BIAS if instructions else 0

NF4, INT8 = 0, 8
"""What is packed, beside elements of 1, 2 or 4 bytes."""

TILE = 4 * ROWS if instructions else 1 << 62
"""Bytes of a row that a square of words has."""

PIECE_BYTES = 4 << 20
"""Of a mapped file: what a thread maps at a time."""

_PREFETCH_PANELS = 1
_POPULATE_READ, _DONTNEED = 22, 4
_PAGE = 4096

_madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


@helper
def _word(record, word):
    return load_i64(record + 8 * word)


@helper
def _advise(address, nbytes, advice):
    """For the pages that hold these bytes. Nothing is lost when the system declines."""
    start = address - address % _PAGE
    _madvise(start, address + nbytes - start, types.int32(advice))


# A register of words, one of each row of the panel, in the order of its format


def _nf4_register(b, words):
    """Features 0..7 of a group: 0 1 | 2 3 | 4 5 | 6 7, high half first, become 0 4 | 1 5 | 2 6 | 3 7, low first."""
    count = 4 * words.type.count
    stored = b.bitcast(words, ir.VectorType(I8, count))
    pairs = ir.VectorType(I16, count // 2)

    def doubled(first):
        """Bytes `first` and `first + 1` of every word, each twice."""
        indices = [4 * (i // 4) + first + i % 4 // 2 for i in range(count)]
        return b.bitcast(shuffle(b, stored, None, indices), pairs)

    def bits(value, mask):
        return b.and_(value, ir.Constant(pairs, [mask] * pairs.count))

    four = ir.Constant(pairs, [4] * pairs.count)
    low, high = doubled(0), doubled(2)
    low = b.or_(bits(b.lshr(low, four), 0x000F), bits(low, 0x0F00))
    high = b.or_(bits(high, 0x00F0), bits(b.shl(high, four), 0xF000))
    return b.or_(low, high)


def _int8_register(b, words):
    stored = b.bitcast(words, ir.VectorType(I8, 4 * words.type.count))
    return b.add(stored, ir.Constant(stored.type, [WEIGHT_BIAS] * stored.type.count))


def _element_register(b, words, size):
    """The rows' first elements, then their second ones, and so on."""
    each = 4 // size
    if each == 1:
        return words
    count = words.type.count
    elements = b.bitcast(words, ir.VectorType(ir.IntType(8 * size), each * count))
    return shuffle(b, elements, None, [each * row + i for i in range(each) for row in range(count)])


def _emit_tile(b, what, source, stride, out, streaming):
    rows = []
    ahead = b.mul(stride, e.const(ROWS * _PREFETCH_PANELS))
    for r in range(ROWS):
        at = e.offset(b, source, b.mul(stride, e.const(r)))
        e.prefetch(b, e.offset(b, at, ahead), 2)
        rows.append(e.load(b, at, e.I32V))
    for column, words in enumerate(transpose(b, rows)):
        if what == NF4:
            ordered = _nf4_register(b, words)
        elif what == INT8:
            ordered = _int8_register(b, words)
        else:
            ordered = _element_register(b, words, what)
        at = e.offset(b, out, column * 4 * ROWS)
        if streaming:
            e.stream(b, ordered, at)
        else:
            e.store(b, ordered, at)


@intrinsic(prefer_literal=True)
def _tile(typing_context, what, streaming, source, stride, out):
    """A square of words: `TILE` bytes of each row of a panel."""
    kind, past_caches = what.literal_value, streaming.literal_value

    def codegen(context, builder, signature, args):
        if instructions:
            _emit_tile(builder, kind, *args[2:], past_caches)
        return context.get_dummy_value()

    return types.void(what, streaming, *[types.int64] * 3), codegen


@intrinsic
def _fence(typing_context):
    """Orders streaming stores before what follows."""

    def codegen(context, builder, signature, args):
        if instructions:
            e.intrinsic_call(builder, "llvm.x86.sse.sfence", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


# The same without registers


@helper
def _nf4_word(codes):
    low, high = 0, 0
    for j in range(4):
        byte = (codes >> (8 * (j // 2))) & 255
        low |= ((byte >> 4) if j % 2 == 0 else byte & 15) << (8 * j)
        byte = (codes >> (16 + 8 * (j // 2))) & 255
        high |= ((byte >> 4) if j % 2 == 0 else byte & 15) << (8 * j + 4)
    return low | high


@helper
def _plain_words(what, source, stride, first, row_bytes, rows, out):
    """NF4 or int8: the rows' bytes from `first` on; `rows` of the panel are there."""
    for at in range(first, row_bytes, 4):
        for r in range(ROWS):
            to = out + at * ROWS + 4 * r
            if what == NF4:
                store_i32(to, _nf4_word(load_i32(source + r * stride + at)) if r < rows else 0)
            else:
                for j in range(4):
                    value = load_u8(source + r * stride + at + j) if r < rows else 0
                    store_u8(to + j, value + WEIGHT_BIAS)


@helper
def _plain_elements(size, source, stride, first, row_bytes, rows, out):
    for at in range(first, row_bytes, size):
        for r in range(ROWS):
            here, to = source + r * stride + at, out + at * ROWS + size * r
            if size == 1:
                store_u8(to, load_u8(here) if r < rows else 0)
            elif size == 2:
                store_u16(to, load_u16(here) if r < rows else 0)
            else:
                store_i32(to, load_i32(here) if r < rows else 0)


def _packer(what: int, name: str) -> Kernel:
    # Values are stored past the caches, aligned; scales share lines between threads and stay.
    quantised = what in (NF4, INT8)

    def pack(record, thread, threads):
        rows, columns, stride = _word(record, R.P_ROWS), _word(record, R.P_COLUMNS), _word(record, R.P_ROW_BYTES)
        panels = (rows + ROWS - 1) // ROWS
        begin, end = panels * thread // threads, panels * (thread + 1) // threads
        row_bytes = columns // 2 if what == NF4 else (columns if what == INT8 else columns * what)
        tiled = row_bytes // TILE * TILE
        mapped = _word(record, R.P_MAPPED) != 0
        step = max(PIECE_BYTES // (ROWS * stride), 1)
        for piece in range(begin, end, step):
            last = min(piece + step, end)
            piece_at = _word(record, R.P_SOURCE) + piece * ROWS * stride
            piece_bytes = (min(last * ROWS, rows) - piece * ROWS - 1) * stride + row_bytes
            if mapped:
                _advise(piece_at, piece_bytes, _POPULATE_READ)
            for panel in range(piece, last):
                source = _word(record, R.P_SOURCE) + panel * ROWS * stride
                out = _word(record, R.P_OUT) + panel * ROWS * row_bytes
                there = min(rows - panel * ROWS, ROWS)
                left = 0
                if there == ROWS:
                    for at in range(0, tiled, TILE):
                        _tile(what, quantised, source + at, stride, out + at * ROWS)
                    left = tiled
                if quantised:
                    _plain_words(what, source, stride, left, row_bytes, there, out)
                else:
                    _plain_elements(what, source, stride, left, row_bytes, there, out)
            if mapped:
                _advise(piece_at, piece_bytes, _DONTNEED)
        _fence()

    return Kernel(pack, name)


pack_nf4 = _packer(NF4, "pack-nf4")
"""4-bit codes, two to a byte, the high half first; `P_ROW_BYTES` apart from row to row."""

pack_int8 = _packer(INT8, "pack-int8")


@cache
def pack_elements(size: int) -> Kernel:
    """Elements of `size` bytes, each column's rows of a panel together: floats, scales, and scale codes."""
    return _packer(size, f"pack-elements-{size}")
