"""Transposing a square of 4-byte words between vector registers.

Written as shuffles of LLVM in the shapes that CPUs have instructions for: words interleaved inside lanes of 16 bytes,
then whole lanes.
"""

from llvmlite import ir

from tpcpu.kernels.memory import I32

_LANE = 4
"""Words that instructions interleave; lanes of so many are then moved whole."""


def shuffle(b, x, y, indices):
    """Elements of the two vectors, counted through; y may be None."""
    mask = ir.Constant(ir.VectorType(I32, len(indices)), list(indices))
    return b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined) if y is None else y, mask)


def transpose(b, rows):
    """`rows`: as many vectors of words as each has words, 8 or 16. Gives the columns, in order."""
    count = len(rows)
    lanes = count // _LANE
    # columns[j][q]: in lane L, rows 4q to 4q + 3 of column 4L + j
    columns = [[] for _ in range(_LANE)]
    for first in range(0, count, _LANE):
        even, odd = (_interleave(b, *rows[first + i : first + i + 2], 1) for i in (0, 2))
        for half in (0, 1):
            columns[2 * half : 2 * half + 2] = [
                [*before, joined]
                for before, joined in zip(
                    columns[2 * half : 2 * half + 2], _interleave(b, even[half], odd[half], 2), strict=True
                )
            ]
    result = [None] * count
    for j in range(_LANE):
        for lane, column in enumerate(_transpose_lanes(b, columns[j], lanes)):
            result[_LANE * lane + j] = column
    return result


def _interleave(b, x, y, words):
    """The lower, then the upper half of each lane: `words` of x, as many of y, and so on."""
    count = x.type.count
    halves = []
    for upper in (0, 1):
        indices = []
        for lane in range(0, count, _LANE):
            for at in range(lane + upper * _LANE // 2, lane + upper * _LANE // 2 + _LANE // 2, words):
                indices += [*range(at, at + words), *range(count + at, count + at + words)]
        halves.append(shuffle(b, x, y, indices))
    return halves


def _transpose_lanes(b, vectors, lanes):
    """Lane L of every vector, in order, for each L."""

    def pick(x, y, chosen):
        """Lanes of x, then lanes of y."""
        count, half = x.type.count, len(chosen) // 2
        starts = [_LANE * lane + (count if i >= half else 0) for i, lane in enumerate(chosen)]
        return shuffle(b, x, y, [start + k for start in starts for k in range(_LANE)])

    if lanes == 2:
        return [pick(*vectors, (lane, lane)) for lane in (0, 1)]
    pairs = [[pick(*vectors[i : i + 2], (first, first + 1, first, first + 1)) for i in (0, 2)] for first in (0, 2)]
    return [pick(*pairs[lane // 2], (lane % 2, lane % 2 + 2, lane % 2, lane % 2 + 2)) for lane in range(4)]
