"""WKV-4, the recurrence of RWKV-4: an average of the values so far, each channel by itself.

         sum_{s<t} e^{(t-1-s) l + k_s} v_s + e^{u + k_t} v_t
    y_t = --------------------------------------------------        l = -exp(w)
         sum_{s<t} e^{(t-1-s) l + k_s}     + e^{u + k_t}

Shapes: B batch, T time, C channels.
Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.

The two sums, alpha and beta, leave the range of floats. They are held as e^p a and e^p b, p the largest exponent in them,
and every exponential below is of what lies p or more under it. The state is a, b and p. Only e^p a and e^p b have a
meaning; p is the choice of a unit, and gradients are taken at a fixed choice: that of p is zero.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.choice import Form, Op, implementation, recurrence
from kernels.operator import operator
from kernels.recurrence import differentiate

NOTHING = -1e38
"""The exponent of an empty sum."""

FORMS: tuple[Form, ...] = ("cpu", "cuda", "triton", "torch")


def wkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, *, op: Op = "auto") -> tuple[Tensor, Tensor]:
    """Run the recurrence over T steps.

    Args:
        k: (B, T, C) key.
        v: (B, T, C) value.
        w: (C,) the checkpoint's time_decay: the log decay of a step is -exp(w).
        u: (C,) the checkpoint's time_first, added to the key of the current step.
        state: (B, 3, C) float32 (or float64, to measure errors by): a, b and p before the first step. At the start of a
            text, a and b are 0 and p is `NOTHING`.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        y, (B, T, C) in the dtype of k, and the state after the last step, in the dtype of `state`. Both are
        differentiable in k, v, w, u and the state's a and b, with every p held constant.

    Raises:
        ValueError: the shapes disagree, T is 0, `state` is neither float32 nor float64, or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    _check(k, v, w, u, state)
    form = recurrence("wkv4", op, k if state.dtype == torch.float32 else state, k.shape[1], FORMS)
    return apply(form, k, v, w, u, state)


def wkv4_reference(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations above, step by step, in the dtype of `state`. Slow, differentiable, and the truth."""
    dtype = k.dtype
    k, v, w, u = (x.to(state.dtype) for x in (k, v, w, u))
    log_decay = -torch.exp(w)
    a, b, p = state.unbind(1)
    p = p.detach()
    ys = []
    for t in range(k.shape[1]):
        now = u + k[:, t]
        largest = torch.maximum(p, now).detach()
        before, here = torch.exp(p - largest), torch.exp(now - largest)
        ys.append((before * a + here * v[:, t]) / (before * b + here))
        decayed = log_decay + p
        p = torch.maximum(decayed, k[:, t]).detach()
        before, here = torch.exp(decayed - p), torch.exp(k[:, t] - p)
        a, b = before * a + here * v[:, t], before * b + here
    return torch.stack(ys, 1).to(dtype), torch.stack((a, b, p), 1)


def _check(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> None:
    if k.ndim != 3 or k.shape[1] == 0:
        raise ValueError(f"k is {tuple(k.shape)}; it must be (B, T, C) with T of 1 or more; reshape it")
    if v.shape != k.shape:
        raise ValueError(f"v is {tuple(v.shape)} but k is {tuple(k.shape)}; both are (B, T, C); reshape it")
    batch, _, channels = k.shape
    for name, x in (("w", w), ("u", u)):
        if x.shape != (channels,):
            raise ValueError(f"{name} is {tuple(x.shape)}; it must be {(channels,)}, one for all steps; flatten it")
    if state.shape != (batch, 3, channels):
        raise ValueError(f"state is {tuple(state.shape)}; it must be {(batch, 3, channels)}; expand it over the batch")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}; the recurrence loses too much below float32; pass state.float()")


def apply(form: Form, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The operator by the form of that name, which must be able to work on these: `wkv4` has chosen and checked."""
    with torch.autocast(state.device.type, enabled=False):  # it would turn the products of some forms to bfloat16
        if form == "reference":
            return wkv4_reference(k, v, w, u, state)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, w, u, state))
        y, final, _ = _forward(k, v, w, u, state, form, keep)
        return y, final


def _implementation(form: str) -> Any:
    """The module of a form: `forward`, `backward`, and `kept`, which gives the memory that the one leaves to the other."""
    return implementation("wkv4", form, FORMS)


@operator("rwkv::wkv4")
def _forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, form: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and if `keep`, what the backward needs beside the inputs."""
    y, final, kept = _implementation(form).forward(k, v, w, u, state, keep)
    return y, final, kept


@_forward.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, form: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _implementation(form).kept(k.shape[1], state) if keep else state.new_empty(0)
    return k.new_empty(k.shape), torch.empty_like(state, memory_format=torch.contiguous_format), kept


@operator("rwkv::wkv4_backward")
def _backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the first state, in their dtypes."""
    dk, dv, dw, du, dstate = _implementation(form).backward(k, v, w, u, kept, dy, dfinal)
    return dk, dv, dw, du, dstate


@_backward.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dk, dv, dw, du = (x.new_empty(x.shape) for x in (k, v, w, u))
    return dk, dv, dw, du, dfinal.new_empty(dfinal.shape)


differentiate(_forward, _backward)
