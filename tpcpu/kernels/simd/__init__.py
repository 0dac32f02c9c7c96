"""Vector registers for kernels: `vectors` for whole kernels, and the instructions that differ between CPUs.

`instructions` is one file per instruction set behind the same names, chosen once per process:

    lookup(b, table, index)         bytes of a 16-entry table by the low four bits of each index
    lookup_f32(b, table, index)     floats of a 16-entry table (the value that `table_f32` loaded)
    table_f32(b, address)           16 floats in registers
    gather_f32(b, address, index)   floats at address + 4 * index
    dot4(b, sums, weights, x)       adds to each int32 lane the sum of four products of bytes; x is signed
    WEIGHT_BIAS                     what is added to a signed weight before `dot4` sees it: 128 or 0

The generic set has none of these: its kernels are plain loops that LLVM vectorises.
"""

from importlib import import_module
from typing import Any

from tpcpu.kernels.isa import selected

instructions: Any = import_module(f"{__name__}.{selected().name}") if selected().panel_rows > 1 else None
