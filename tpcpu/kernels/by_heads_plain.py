"""`by_heads.py` for CPUs without the instructions it needs: row by row, in the published layouts.

Threads divide heads. The order of sums is this file's own, as that of `linear_plain.py`.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.activations import word
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.linear_plain import HALF, decode, float_block, power, scale
from tpcpu.kernels.memory import load_f32, store_f32
from tpcpu.kernels.record import BLOCK, FLOATS, MXFP4


def room_bytes(rows: int, columns: int) -> int:
    """What a thread needs for heads of a weight: a decoded row."""
    return 4 * (columns + BLOCK)


@helper
def _multiply_by_powers(segment, row, decoded):
    """Gives a decoded row the scales of its halves of blocks."""
    for i in range(word(segment, R.S_COLUMNS)):
        at = decoded + 4 * i
        store_f32(at, load_f32(at) * power(segment, row, i // HALF))


@helper
def _dot(segment, row, decoded, x, scaled, form):
    """A decoded row times activations."""
    columns, total = word(segment, R.S_COLUMNS), float32(0.0)
    for at in range(0, columns, BLOCK):
        product = float_block(decoded + 4 * at, x + 4 * at, min(columns - at, BLOCK))
        total += scale(segment, row, at // BLOCK, form) * product if scaled else product
    return total


@helper
def _add(segment, row, decoded, factor, out, is_first, scaled, form):
    """out += factor * a decoded row, or is that."""
    for i in range(word(segment, R.S_COLUMNS)):
        value = load_f32(decoded + 4 * i)
        if scaled:
            value *= scale(segment, row, i // BLOCK, form)
        before = float32(0.0) if is_first else load_f32(out + 4 * i)
        store_f32(out + 4 * i, before + factor * value)


def _make(form: int, turned: bool, name: str) -> Kernel:
    scaled = form not in (*FLOATS, MXFP4)

    def by_heads(record, thread, threads):
        segment, tokens, heads = word(record, R.SEGMENTS), word(word(record, R.COUNT), 0), word(record, R.H_HEADS)
        decoded = word(record, R.ROOM) + thread * word(record, R.ROOM_STRIDE)
        for head in range(heads * thread // threads, heads * (thread + 1) // threads):
            for inside in range(word(record, R.H_ROWS)):
                row = word(record, R.H_FIRST) + head * word(record, R.H_STEP) + inside
                decode(record, segment, row, decoded, form, 1)
                if form == MXFP4:
                    _multiply_by_powers(segment, row, decoded)
                for token in range(tokens):
                    x = word(record, R.X) + token * word(record, R.X_STRIDE) + head * word(record, R.H_X_STEP)
                    out = word(record, R.H_OUT) + token * word(record, R.H_OUT_STRIDE)
                    out += head * word(record, R.H_OUT_STEP)
                    if turned:
                        _add(segment, row, decoded, load_f32(x + 4 * inside), out, inside == 0, scaled, form)
                    else:
                        store_f32(out + 4 * inside, _dot(segment, row, decoded, x, scaled, form))

    return Kernel(by_heads, name)


@cache
def by_heads(form: int) -> Kernel:
    """out_h = x_h @ w_h.T for weights of a format."""
    return _make(form, False, f"linear-by-heads-plain-{form}")


@cache
def turned_by_heads(form: int) -> Kernel:
    """out_h = x_h @ w_h for weights of a format."""
    return _make(form, True, f"linear-turned-by-heads-plain-{form}")
