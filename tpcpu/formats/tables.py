"""The published tables of bitsandbytes: the 16 values of NF4 and of FP4, and the 256 of the 8-bit dynamic map.

Literals, because neither NF4 nor the map can be recomputed to the bit: the first comes from quantiles of the normal
distribution, the second from a float32 `linspace` whose last bits belong to one library. Files carry their own copies.
"""

import base64

import numpy as np
import numpy.typing as npt

NF4_CODE: npt.NDArray[np.float32] = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
NF4_CODE.flags.writeable = False

# NF4's decision points: the float32 middle of two neighbours; a value on a middle belongs to the lower code.
NF4_MIDPOINTS: npt.NDArray[np.float32] = (NF4_CODE[:-1] + NF4_CODE[1:]) * np.float32(0.5)
NF4_MIDPOINTS.flags.writeable = False

# FP4: sign, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4. Its dequantiser has a negative zero, where its table has none.
FP4_CODE: npt.NDArray[np.float32] = np.array(
    [sign * value / 192 for sign in (1.0, -1.0) for value in (0, 1, 128, 192, 64, 96, 32, 48)], dtype=np.float32
)
FP4_CODE.flags.writeable = False

# The 127 values strictly between 0 and 1, as little-endian float32: for i = 0..6, 10^(i-6) times the 2^i centres of
# equal parts of [0.1, 1]. The map is their negatives, zero, themselves, and 1.
_DYNAMIC_POSITIVE = """
t6MTNZQaWjb/BQI3BkKyNzSANziz74o4Sx+6OAvXIzkF54w5g+LHOQFvATrB7B46gGo8Oj7oWTr/ZXc6ne+nOvyp8Totsh07XI9C
O4psZzvdJIY7dJOYOw0CqzukcL07O9/PO9NN4jtqvPQ7gZUDPM3MDDwYBBY8ZDsfPEjhOjzD9Wg8H4WLPF2Pojyambk816PQPBWu
5zxSuP48SOEKPWdmFj2F6yE9o3AtPcP1OD3hekQ9AABQPR+FWz09Cmc9XY9yPXsUfj3NzIQ9XY+KPetRkD17FJY9CtebPZqZoT0q
XKc9uB6tPUjhsj3Xo7g9Z2a+PfcoxD2F68k9NDPbPQAA+D1mZgo+zcwYPjMzJz6amTU+AABEPmZmUj7NzGA+MzNvPpmZfT4AAIY+
NDONPmZmlD6amZs+zMyiPgAAqj4zM7E+Zma4PpqZvz7MzMY+AADOPjMz1T5mZtw+mpnjPszM6j4AAPI+MjP5PjMzAD/MzAM/ZmYH
PwAACz+amQ4/NDMSP83MFT9mZhk/AAAdP5qZID80MyQ/zcwnP2ZmKz8AAC8/mpkyPzQzNj/NzDk/ZmY9PwAAQT+amUQ/MzNIP83M
Sz9mZk8/AABTP5qZVj8zM1o/zcxdP2ZmYT8AAGU/mploPzMzbD/NzG8/ZmZzPwAAdz+amXo/MzN+Pw==
"""


def _dynamic_map() -> npt.NDArray[np.float32]:
    positive = np.frombuffer(base64.b64decode(_DYNAMIC_POSITIVE), dtype="<f4").astype(np.float32)
    ends = np.array([0.0, 1.0], dtype=np.float32)
    return np.concatenate([-positive[::-1], ends[:1], positive, ends[1:]])


def _nearest_code() -> npt.NDArray[np.uint8]:
    grid = np.arange(65536, dtype=np.float64) / 32767.5 - 1.0
    middles = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) * np.float32(0.5)
    return np.searchsorted(middles.astype(np.float64), grid, side="left").astype(np.uint8)


DYNAMIC_MAP: npt.NDArray[np.float32] = _dynamic_map()
DYNAMIC_MAP.flags.writeable = False

# How bitsandbytes 0.50 finds the 8-bit code of a value in [-1, 1]: nearest code of one of 65536 evenly spaced points.
# (Earlier versions searched for the exact nearest code; one scale code in a thousand differs.)
NEAREST_CODE: npt.NDArray[np.uint8] = _nearest_code()
NEAREST_CODE.flags.writeable = False
