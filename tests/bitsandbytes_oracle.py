"""Values of 4-bit tensors as bitsandbytes dequantises them on any processor."""

import copy

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit


def dequantised(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The tensor, of the state's shape and dtype.

    Where torch has AVX-512, bitsandbytes takes a kernel that begins a block with every row, as its format does not. Of
    a single row it makes what other processors make, but for the sign of FP4's second zero.
    """
    row = copy.copy(state)
    row.shape = torch.Size([1, state.shape.numel()])
    return dequantize_4bit(packed, row).reshape(state.shape)
