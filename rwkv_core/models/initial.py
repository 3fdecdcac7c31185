"""Initial values that several versions share, as the official pretraining sets them.

Shapes: C channels.
Source: BlinkDL/RWKV-LM: RWKV-v4neo, RWKV-v5 and RWKV-v7/train_temp.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_core.models.skeleton import Shape


def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter of any shape to as many values."""
    parameter.copy_(value.view_as(parameter))


def orthogonal(gains: Mapping[nn.Linear, float], generator: torch.Generator) -> None:
    """Orthogonal matrices times a gain; 0 is a matrix of zeros."""
    for linear, gain in gains.items():
        if gain:
            nn.init.orthogonal_(linear.weight, gain=gain, generator=generator)
        else:
            linear.weight.zero_()


def depth(layer: int, n_layer: int) -> tuple[float, float]:
    """Two measures by which the layers' initial values differ: 0 in the first to 1 in the last; 1 in the first towards 0."""
    return layer / max(n_layer - 1, 1), 1 - layer / n_layer


def position(channels: int) -> Tensor:
    """0 in the first channel, towards 1 in the last: (C,)."""
    return torch.arange(channels, dtype=torch.float32) / channels


def ramp(channels: int) -> Tensor:
    """0 in the first channel, 1 in the last: (C,)."""
    return torch.arange(channels, dtype=torch.float32) / max(channels - 1, 1)


def token_shift(att: Any, ffn: Any, s: Shape, layer: int) -> None:
    """Token shift of RWKV-4 and 5: how much of the token itself each channel reads; the rest is of the one before."""
    deep, fade = depth(layer, s.n_layer)
    at = position(s.n_embd)
    put(att.time_mix_k, at**fade)
    put(att.time_mix_v, at**fade + 0.3 * deep)
    put(att.time_mix_r, at ** (0.5 * fade))
    put(ffn.time_mix_k, at**fade)
    put(ffn.time_mix_r, at**fade)


def decay_and_bonus(att: Any, s: Shape, deep: float) -> None:
    """Decays and bonuses of RWKV-5 and 6, by head or by channel."""
    at = ramp(att.time_decay.numel())
    put(att.time_decay, -6 + 5 * at ** (0.7 + 1.3 * deep))
    if hasattr(att, "time_first"):
        att.time_first.fill_(-3.0)
        return
    zigzag = 0.1 * ((torch.arange(len(at)) + 1) % 3 - 1) if len(at) == s.dim_att else 0.0
    put(att.time_faaaa, deep * (1 - at) + zigzag)
