"""RWKV-7 "Goose": a recurrent language model whose state learns by a generalised delta rule.

Shapes: B batch, T time, C channels, H heads, N head size.
Source: Peng et al. 2025, arXiv:2503.14456; initial values and learning-rate groups: BlinkDL/RWKV-LM, RWKV-v7/train_temp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choice import Op
from kernels.wkv7 import wkv7
from rwkv_core.models.initial import depth, orthogonal, position, put, ramp
from rwkv_core.models.skeleton import RWKV, Shape, layers_of, shift, vector, width


@dataclass(frozen=True)
class Shape7(Shape):
    """Sizes."""

    decay_rank: int
    """Hidden size of w1, w2; and so on for a, v, g."""
    a_rank: int
    v_rank: int
    gate_rank: int
    value_residual_in_layer_0: bool
    """Whether blocks.0.att has v0, v1, v2. They are never used, and kept."""


class TimeMix(nn.Module):
    """Attention's place: reads the past through the WKV state."""

    def __init__(self, s: Shape7, layer: int, op: Op) -> None:
        super().__init__()
        self.layer, self.head_size, self.op = layer, s.head_size, op
        c, heads = s.n_embd, s.n_embd // s.head_size

        def pair(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(c, rank)), nn.Parameter(torch.empty(rank, c))

        # in the order of the released files: converters read x_r to x_g by it
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(c) for _ in range(6))
        self.w0 = vector(c)
        self.r_k = nn.Parameter(torch.empty(heads, s.head_size))
        self.w1, self.w2 = pair(s.decay_rank)
        self.a1, self.a2 = pair(s.a_rank)
        self.a0 = vector(c)
        self.g1, self.g2 = pair(s.gate_rank)
        if layer > 0 or s.value_residual_in_layer_0:
            v1, v2 = pair(s.v_rank)
            self.v2, self.v1 = v2, v1
            self.v0 = vector(c)
        self.k_k, self.k_a = vector(c), vector(c)
        self.receptance, self.key, self.value, self.output = (nn.Linear(c, c, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(heads, c, eps=s.group_norm_eps)

    def forward(self, x: Tensor, v_first: Tensor | None, last: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C), the value of layer 0 (None in layer 0), shift and WKV state -> output, that value, WKV state."""
        batch, time, channels = x.shape
        delta = shift(x, last) - x
        xr, xw, xk, xv, xa, xg = (
            x + delta * mix for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w_raw = self.w0 + torch.tanh(xw @ self.w1) @ self.w2
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)  # in-context learning rate
        g = torch.sigmoid(xg @ self.g1) @ self.g2

        def heads(z: Tensor) -> Tensor:
            return z.view(batch, time, -1, self.head_size)

        kappa = F.normalize(heads(k * self.k_k), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)
        y, state = wkv7(heads(r), heads(w_raw), heads(k), heads(v), -kappa, kappa * heads(a), state, op=self.op)
        y = self.ln_x(y.reshape(batch * time, channels)).view(batch, time, channels)
        bonus = (heads(r) * heads(k) * self.r_k).sum(-1, keepdim=True) * heads(v)
        return self.output((y + bonus.view_as(y)) * g), v_first, state


class ChannelMix(nn.Module):
    """The feed-forward part: a squared ReLU between two matrices."""

    def __init__(self, s: Shape, layer: int) -> None:
        super().__init__()
        self.x_k = vector(s.n_embd)
        self.key = nn.Linear(s.n_embd, s.dim_ffn, bias=False)
        self.value = nn.Linear(s.dim_ffn, s.n_embd, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """(B, T, C) and the shift state -> (B, T, C)."""
        hidden: Tensor = self.key(x + (shift(x, last) - x) * self.x_k)
        output: Tensor = self.value(torch.relu(hidden) ** 2)
        return output


class RWKV7(RWKV):
    """The whole model."""

    config: Shape7
    time_mix, channel_mix = TimeMix, ChannelMix
    rates = {"att.w0": 2.0}  # noqa: RUF012 (declared a ClassVar above)

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor], head_size_divisor: float) -> Shape7:
        """See `RWKV.shape_of`."""
        n_layer, n_embd = layers_of(tensors), width(tensors, "emb.weight", 1)
        heads, head_size = (width(tensors, "blocks.0.att.r_k", i) for i in (0, 1))
        if heads * head_size != n_embd:
            raise ValueError(f"blocks.0.att.r_k is ({heads}, {head_size}); its heads must share the {n_embd} channels")
        # the value residual begins in layer 1: a model of one layer has none that counts
        v1 = f"blocks.{1 if n_layer > 1 else 0}.att.v1"
        return Shape7(
            version="7",
            n_layer=n_layer,
            n_embd=n_embd,
            dim_att=n_embd,
            dim_ffn=width(tensors, "blocks.0.ffn.key.weight", 0),
            head_size=head_size,
            vocab_size=width(tensors, "emb.weight", 0),
            head_size_divisor=head_size_divisor,
            decay_rank=width(tensors, "blocks.0.att.w1", 1),
            a_rank=width(tensors, "blocks.0.att.a1", 1),
            v_rank=width(tensors, v1, 1) if n_layer > 1 or v1 in tensors else 0,
            gate_rank=width(tensors, "blocks.0.att.g1", 1),
            value_residual_in_layer_0="blocks.0.att.v0" in tensors,
        )

    @classmethod
    def new_shape(cls, n_layer: int, n_embd: int, head_size: int, vocab_size: int) -> Shape7:
        """See `RWKV.new_shape`."""

        def rank(factor: float) -> int:
            return max(32, 32 * round(factor * math.sqrt(n_embd) / 32))

        return Shape7(
            "7", n_layer, n_embd, n_embd, 4 * n_embd, head_size, vocab_size, 8.0,
            decay_rank=rank(2.5), a_rank=rank(2.5), v_rank=rank(1.7), gate_rank=rank(5), value_residual_in_layer_0=False,
        )  # fmt: skip

    def initialize_block(self, block: Any, layer: int, generator: torch.Generator) -> None:
        """See `RWKV.initialize_block`."""
        att, ffn, s = block.att, block.ffn, self.config
        deep, fade = depth(layer, s.n_layer)
        at = position(s.n_embd)
        n = torch.arange(s.n_embd, dtype=torch.float32)
        linear = ramp(s.n_embd) - 0.5
        zigzag = (n % s.head_size - (s.head_size - 1) / 2) / ((s.head_size - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        for parameter, power in (
            (att.x_r, 0.2), (att.x_w, 0.9), (att.x_k, 0.7), (att.x_v, 0.7), (att.x_a, 0.9), (att.x_g, 0.2)
        ):  # fmt: skip
            put(parameter, 1 - at ** (power * fade))
        put(ffn.x_k, 1 - at ** (fade**4))
        put(att.w0, -6 + 6 * ramp(s.n_embd) ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag)
        put(att.a0, -0.19 + 0.3 * zigzag + 0.4 * linear)
        put(att.k_k, 0.71 - 0.1 * linear)
        att.k_a.fill_(1.02)
        att.r_k.fill_(-0.04)
        if hasattr(att, "v0"):
            put(att.v0, 0.73 - 0.4 * linear)
        for name in ("w", "a", "g", "v"):
            if hasattr(att, f"{name}1"):
                down, up = getattr(att, f"{name}1"), getattr(att, f"{name}2")
                down.zero_()
                gain = 0.1 * math.sqrt(max(1.0, up.shape[0] / up.shape[1]))
                nn.init.orthogonal_(up, gain=gain, generator=generator)
        gains = {att.receptance: 1.0, att.key: 0.1, att.value: 1.0, ffn.key: 1.0, att.output: 0.0, ffn.value: 0.0}
        orthogonal(gains, generator)
