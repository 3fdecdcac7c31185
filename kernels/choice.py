"""Which implementation of an operator runs, and why."""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import build
from kernels.operator import PLAIN

Op = Literal["auto", "cpu", "cuda", "triton", "fla", "torch", "reference"]
"""What is asked for: "auto" is the fastest that works."""

Form = Literal["cpu", "cuda", "triton", "fla", "torch", "reference"]
"""What runs: C++, CUDA C++, Triton, flash-linear-attention, torch in chunks, or the equations step by step."""

WKV: tuple[Form, ...] = ("cpu", "cuda", "triton", "fla", "torch")
"""The forms of a recurrence, fastest first."""

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""What the C++ reads and writes. It computes in float32."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)


def choose(name: str, op: Op, forms: Sequence[Form], x: Tensor) -> Form:
    """The form of an operator that `op` means, logged once for each operator and kind of tensor.

    Args:
        name: the operator's, as its sources are named.
        op: "auto" takes the first of `forms` that works on `x`. So does one that this operator does not have, as "fla" is to
            a layer norm: it is for others.
        forms: what the operator has, fastest first.
        x: a tensor of the kind that it is to work on: its device and dtype count.

    Raises:
        ValueError: the form that was asked for can't work on `x`.
        RuntimeError: it could not be compiled, or its library is missing.
    """
    if op == "reference":
        return op
    if op != "auto" and op in forms:
        obstacle = _obstacle(name, op, x)
        if obstacle:
            kind, message = obstacle
            raise kind(f"{name}: op='{op}' {message}; or say op='auto'")
        chosen: Form = op
    else:
        chosen = next((form for form in forms if not _obstacle(name, form, x)), "torch")
    if not torch.compiler.is_compiling():
        _say(name, chosen, x.device.type, x.dtype)
    return chosen


def recurrence(name: str, op: Op, x: Tensor, steps: int, forms: Sequence[Form] = WKV) -> Form:
    """`choose` for a recurrence. One step needs no chunks: it is the equations themselves, where nothing is compiled."""
    chosen = choose(name, op, forms, x)
    return "reference" if op == "auto" and chosen == "torch" and steps == 1 else chosen


@functools.cache
def implementation(name: str, form: str, forms: Sequence[Form]) -> Any:
    """The module of an operator's form.

    Raises:
        ValueError: there is none.
    """
    module = f"kernels.{name}_{form}"
    if form not in forms or importlib.util.find_spec(module) is None:
        raise ValueError(f"form={form!r}; it must be one of {forms}; say op='auto'")
    return importlib.import_module(module)


@functools.cache
def _say(name: str, chosen: Form, device: str, dtype: torch.dtype) -> None:
    _log.info("%s on %s, %s: %s", name, device, str(dtype).removeprefix("torch."), chosen)


def _obstacle(name: str, form: Form, x: Tensor) -> tuple[type[Exception], str] | None:
    """What keeps a form from working on tensors like x: the error, and its rule and remedy."""
    if form == "cpu":
        if not x.is_cpu or x.dtype not in CPU_DTYPES:
            return ValueError, f"for {x.dtype} on {x.device.type}; it works on float32 and bfloat16 on the CPU"
        return _not_built(name, "cpu")
    if form in ("cuda", "triton", "fla"):
        if not x.is_cuda or x.dtype not in _FLOATS:
            return ValueError, f"for {x.dtype} on {x.device.type}; it works on float32, bfloat16 and float16 on a GPU"
        if form == "cuda":
            if torch.version.hip:
                return ValueError, "on an AMD GPU; it is for NVIDIA's; say op='triton'"
            return _not_built(name, "cuda")
        package = {"triton": "triton", "fla": "fla-core"}[form]
        if not _installed(form):
            return RuntimeError, f"needs {package}, which is not installed; pip install {package}"
    return None


def _not_built(name: str, kind: build.Kind) -> tuple[type[Exception], str] | None:
    return (
        None
        if build.available(name, kind)
        else (RuntimeError, "could not be compiled: a warning has said why; mend that")
    )


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def direct(source: str, *xs: Tensor) -> bool:
    """Whether compiled code may take these tensors' memory at once, past torch's dispatcher, which costs more than a token's
    whole step: on the CPU, with nobody to ask for gradients, and neither autocast nor a compiler to have a
    say in it.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    wanted = torch.is_grad_enabled()
    for x in xs:
        if x.__class__ not in PLAIN or not x.is_cpu or x.dtype not in CPU_DTYPES or (wanted and x.requires_grad):
            return False
    return build.available(source)
