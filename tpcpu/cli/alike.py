"""Lines that differ in numbers alone, told as one: a model of experts has thousands of tensors, and few kinds."""

import math
import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""Of a layer or an expert, in the name of a tensor."""


def together(lines: Iterable[str]) -> list[str]:
    """Of lines that are the same but for numbers between dots one, with all numbers, where its first one stood."""
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(_NUMBER.sub("*", line), []).append(line)
    return [_told(alike) for alike in found.values()]


def _told(lines: Sequence[str]) -> str:
    numbers = [tuple(map(int, _NUMBER.findall(line))) for line in lines]
    places = [sorted(set(place)) for place in zip(*numbers, strict=True)]
    parts = map(spans, places)
    told = _NUMBER.sub(lambda _: next(parts), lines[0])
    # Where not every expert of every layer is meant, ranges say too much.
    return told if len(lines) == math.prod(map(len, places)) else f"{told} ({len(lines)} of these)"


def spans(numbers: Sequence[int]) -> str:
    """`7`, `0-83` or `0,2-4`, of rising numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
