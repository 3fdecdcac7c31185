"""How tensors are handed to compiled code: by address, in an order and a type that it reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import build
from kernels.choice import CPU_DTYPES


def readable(x: Tensor) -> Tensor:
    """The tensor as the C++ reads it: contiguous, and float32 unless bfloat16."""
    return (x if x.dtype in CPU_DTYPES else x.float()).contiguous()


def bf16_bits(xs: Sequence[Tensor]) -> int:
    """Which of them are bfloat16, a bit for each, from the lowest."""
    return sum((x.dtype == torch.bfloat16) << i for i, x in enumerate(xs))


def aligned(x: Tensor) -> Tensor:
    """The tensor as CUDA reads it: contiguous, and from an address where 16 bytes can be read at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x  # a slice of another tensor may begin anywhere


def launch(source: str, name: str, fields: str, device: torch.device, *values: int | Tensor) -> None:
    """Call a CUDA function on a device's current stream, or on the CPU under the stand-in for a GPU.

    Args:
        source: of the library, see `kernels.build.function`.
        name: its name in C.
        fields: of its record; the last is the stream.
        device: where the tensors are.
        values: of the other fields. Tensors are passed by address, which is 0 if they are empty.

    Raises:
        RuntimeError: CUDA's own.
    """
    record = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
    if device.type == "cpu":
        build.function(source, name, fields, "host")(*record, 0)
        return
    with torch.cuda.device(device):
        build.function(source, name, fields, "cuda")(*record, torch.cuda.current_stream(device).cuda_stream)
