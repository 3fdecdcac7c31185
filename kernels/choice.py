"""Which implementation of an operator runs."""

from typing import Literal

import torch
from torch import Tensor

from kernels import build

Op = Literal["auto", "cpu", "torch", "reference"]

Chosen = Literal["cpu", "torch", "reference"]

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""What the C++ reads and writes. It computes in float32."""


def choose(op: Op, x: Tensor, steps: int, compiled: bool = False) -> Chosen:
    """The implementation that `op` means.

    Args:
        op: "auto" takes the fastest that works: the compiled one on a CPU, in float32 or bfloat16; else torch, or for one
            step, which needs no chunks, the reference.
        x: a tensor of the kind that it is to work on: its device and dtype count.
        steps: tokens of the sequence.
        compiled: whether the operator has a compiled form.

    Raises:
        ValueError: "cpu" was asked for, and can't work on `x`, or there is none.
        RuntimeError: "cpu" was asked for, and could not be compiled.
    """
    fits = compiled and x.is_cpu and x.dtype in CPU_DTYPES
    if op == "auto":
        if fits and build.available():
            return "cpu"
        return "torch" if steps > 1 else "reference"
    if op == "cpu":
        if not fits:
            rule = "it works on float32 and bfloat16 on the CPU" if compiled else "this operator has no compiled form"
            raise ValueError(f"op='cpu' for {x.dtype} on {x.device.type}; {rule}; say op='auto'")
        if not build.available():
            raise RuntimeError("op='cpu' could not be compiled: a warning has said why; mend that, or say op='auto'")
    return op


def direct(*xs: Tensor) -> bool:
    """Whether compiled code may take these tensors' memory at once, past torch's dispatcher, which costs more than a token's
    whole step: on the CPU, with nobody to ask for gradients, and neither autocast nor a compiler to have a
    say in it.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    wanted = torch.is_grad_enabled()
    for x in xs:
        if x.__class__ not in _PLAIN or not x.is_cpu or x.dtype not in CPU_DTYPES or (wanted and x.requires_grad):
            return False
    return build.available()


_PLAIN = (Tensor, torch.nn.Parameter)
