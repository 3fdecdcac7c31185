"""Token shift: each token and the one before, mixed once for each of the matrices that follow.

    z_i,t = x_t + (x_{t-1} - x_t) mu_i

Shapes: B batch, T time, C channels. Source: Peng et al. 2025, arXiv:2503.14456.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import build
from kernels.choice import direct


class Norm(NamedTuple):
    """A layer norm over channels."""

    weight: Tensor
    """(C,)"""
    bias: Tensor
    """(C,)"""
    eps: float


def mix(x: Tensor, last: Tensor, mus: Sequence[Tensor], norm: Norm | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Mix each token with the one before it.

    On a CPU in one pass over x, if nobody will ask for gradients; else by torch.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first, already normed.
        mus: the shares of the token before, (C,) or (1, 1, C) each.
        norm: the layer norm that x goes through first; None is none.

    Returns:
        A (B, T, C) for each of `mus`, and the last token (B, C) as it was mixed, the `last` of what follows.
    """
    parameters = (*mus, *norm[:2]) if norm else tuple(mus)
    first = parameters[0]
    if not direct(x, last, *parameters) or any(p.dtype != first.dtype for p in parameters) or last.dtype != x.dtype:
        return mix_reference(x, last, mus, norm)
    batch, steps, channels = x.shape
    if len(mus) > _MOST or last.shape != (batch, channels) or any(p.numel() != channels for p in parameters):
        raise ValueError(
            f"last is {tuple(last.shape)} and the parameters {[tuple(p.shape) for p in parameters]} for x {tuple(x.shape)}; "
            f"they must be {(batch, channels)} and {channels} values each, and at most {_MOST} mixes"
        )
    x, last = x.contiguous(), last.contiguous()
    kept = [p.contiguous() for p in parameters]
    addresses = [p.data_ptr() for p in kept]
    z, final = x.new_empty(len(mus), batch, steps, channels), torch.empty_like(last)
    build.function("rwkv_mix", "12qd7q")(
        x.data_ptr(), last.data_ptr(), z.data_ptr(), final.data_ptr(),
        *addresses[: len(mus)], *[0] * (_MOST - len(mus)), *(addresses[len(mus) :] or (0, 0)), norm.eps if norm else 0.0,
        len(mus), batch, steps, channels, x.dtype is torch.bfloat16, first.dtype is torch.bfloat16, build.threads(),
    )  # fmt: skip
    return z.unbind(), final


_MOST = 6


def mix_reference(
    x: Tensor, last: Tensor, mus: Sequence[Tensor], norm: Norm | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same by torch, with gradients."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *norm)
    change = torch.cat((last[:, None], x[:, :-1]), 1) - x
    return tuple(torch.addcmul(x, change, mu) for mu in mus), x[:, -1]
