"""GGUF's Q8_0: blocks of 32 values, each a scale in float16 and 32 whole numbers of 8 bits.

Source: ggml-org/llama.cpp, ggml/src/ggml-quants.c, quantize_row_q8_0_ref and dequantize_row_q8_0.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Values a scale."""

BYTES = 2 + BLOCK
"""Bytes of a block."""


def pack(x: Tensor) -> Tensor:
    """(..., n) of a multiple of 32 values -> (..., n / 32 * 34) of uint8: what ggml's own reference gives, to the bit."""
    blocks = x.to(torch.float32).reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).div_(127)  # torch's own norm takes eight times as long
    inverse = torch.where(scale == 0, 0.0, 1 / scale)  # of the exact scale, not of the rounded one
    scaled = blocks * inverse
    whole = scaled.trunc()
    whole += scaled.sub_(whole).mul_(2).trunc_()  # halves go away from zero, as roundf has them
    packed = torch.empty(len(blocks), BYTES, dtype=torch.uint8)
    packed[:, :2] = scale.to(torch.float16).view(torch.uint8)
    packed[:, 2:] = whole.to(torch.int8).view(torch.uint8)
    return packed.view(*x.shape[:-1], -1)


def unpack(packed: Tensor) -> Tensor:
    """The inverse: (..., n / 32 * 34) of uint8 -> (..., n) of float32, exact."""
    blocks = packed.reshape(-1, BYTES)
    scale = blocks[:, :2].contiguous().view(torch.float16).to(torch.float32)
    values = blocks[:, 2:].contiguous().view(torch.int8).to(torch.float32)
    return values.mul_(scale).view(*packed.shape[:-1], -1)


def error(x: Tensor) -> Tensor:
    """How far each value may be from what it was, (..., n): half a step, and what the rounding of the scale adds."""
    largest = x.to(torch.float32).reshape(-1, BLOCK).abs().amax(dim=1, keepdim=True)
    return (largest * (0.5001 / 127 + 2**-11) + 127 * 2**-25).expand(-1, BLOCK).reshape(x.shape)
