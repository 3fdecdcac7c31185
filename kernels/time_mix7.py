"""What RWKV-7 computes around its recurrence, channel by channel and head by head.

Before:  kappa = k0 k_k / |k0 k_k|_head        rate = sigmoid(a_raw)        v = v0 + (v_first - v0) sigmoid(v_raw)
         k = k0 (1 + (rate - 1) k_a)           a = -kappa                   b = kappa rate
After:   out = (group_norm(y) + (sum_j r_j k_j r_k_j)_head v) g

Shapes: B batch, T time, C = H N channels, H heads, N head size. Source: Peng et al. 2025, arXiv:2503.14456.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import build
from kernels.choice import direct

# On a CPU each of these is one pass over its inputs in float32, if nobody will ask for gradients; else it is torch.


def prepare(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the recurrence reads: k, v, a and b of `kernels.wkv7`.

    Args:
        k0: (B, T, C), what the key matrix gave.
        v0: (B, T, C), what the value matrix gave.
        v_first: (B, T, C), v0 of layer 0; None in layer 0, whose v is v0.
        a_raw: (B, T, C), the in-context learning rate before its sigmoid.
        v_raw: (B, T, C), the share of v_first before its sigmoid; None in layer 0.
        k_k: C values in any shape.
        k_a: C values in any shape.
        size: N.

    Returns:
        k, v, a, b, (B, T, H, N) each.
    """
    activations = [x for x in (k0, v0, v_first, a_raw, v_raw) if x is not None]
    if not _fit(activations, (k_k, k_a)):
        return prepare_reference(k0, v0, v_first, a_raw, v_raw, k_k, k_a, size)
    if v_first is None or v_raw is None:
        v_first = v_raw = None
    batch, steps, channels = k0.shape
    inputs = [None if x is None else x.contiguous() for x in (k0, v0, v_first, a_raw, v_raw, k_k, k_a)]
    results = k0.new_empty(4, batch, steps, channels // size, size).unbind()
    build.function("rwkv_prepare7", "17q")(
        *(0 if x is None else x.data_ptr() for x in inputs), *(x.data_ptr() for x in results),
        batch * steps, channels // size, size, k0.dtype is torch.bfloat16, k_k.dtype is torch.bfloat16, build.threads(),
    )  # fmt: skip
    return results[0], results[1], results[2], results[3]


def prepare_reference(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by torch, with gradients."""

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, size)

    rate = torch.sigmoid(a_raw)
    v = v0 if v_first is None or v_raw is None else v0 + (v_first - v0) * torch.sigmoid(v_raw)
    kappa = F.normalize(heads(k0 * k_k.view(-1)), dim=-1, eps=1e-12)
    k = k0 * (1 + (rate - 1) * k_a.view(-1))
    return heads(k), heads(v), -kappa, kappa * heads(rate)


def readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    """What the output matrix reads.

    Args:
        y: (B, T, H, N), of `kernels.wkv7`, as are r, k and v.
        r: (B, T, H, N).
        k: (B, T, H, N).
        v: (B, T, H, N).
        g: (B, T, C), the gate.
        weight: (C,), of the norm over each head.
        bias: (C,)
        r_k: (H, N).
        eps: of the norm.

    Returns:
        (B, T, C).
    """
    if not _fit((y, r, k, v, g), (weight, bias, r_k)):
        return readout_reference(y, r, k, v, g, weight, bias, r_k, eps)
    batch, steps, heads, size = y.shape
    inputs = [x.contiguous() for x in (y, r, k, v, g, weight, bias, r_k)]
    out = torch.empty_like(inputs[4])
    build.function("rwkv_readout7", "9qd6q")(
        *(x.data_ptr() for x in inputs), out.data_ptr(), eps,
        batch * steps, heads, size, y.dtype is torch.bfloat16, weight.dtype is torch.bfloat16, build.threads(),
    )  # fmt: skip
    return out


def readout_reference(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    """The same by torch, with gradients."""
    normed = F.group_norm(y.flatten(0, 1).flatten(1), y.shape[2], weight, bias, eps).view_as(g)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (normed + bonus.flatten(2)) * g


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, of any shape. Where no gradients are recorded, it is x itself that comes back, overwritten."""
    if torch.is_grad_enabled() or not direct(x) or not x.is_contiguous():
        return torch.relu(x) ** 2 if torch.is_grad_enabled() else x.relu_().square_()
    build.function("rwkv_relu_squared", "4q")(x.data_ptr(), x.numel(), x.dtype is torch.bfloat16, build.threads())
    return x


def _fit(activations: list[Tensor] | tuple[Tensor, ...], parameters: tuple[Tensor, ...]) -> bool:
    """Whether the compiled form takes them: all activations of one type and size, and all parameters."""
    if not direct(*activations, *parameters):
        return False
    x, p = activations[0], parameters[0]
    return all(y.dtype is x.dtype and y.numel() == x.numel() for y in activations) and all(
        y.dtype is p.dtype and y.numel() == p.numel() for y in parameters
    )
