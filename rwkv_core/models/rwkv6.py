"""RWKV-6 "Finch": RWKV-5 whose decay and token shift depend on the data.

Shapes: B batch, T time, C channels, H heads, N head size, D hidden size of the token shift's low-rank map.
Source: Peng et al. 2024, "Eagle and Finch", arXiv:2404.05892; initial values and learning-rate groups: BlinkDL/RWKV-LM,
RWKV-v5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import products
from kernels.channel_mix import relu_squared
from kernels.choice import Op
from kernels.linear import low_rank
from kernels.recurrence import in_parts
from kernels.token_shift import Norm
from kernels.wkv6 import wkv6
from rwkv_core.models.initial import decay_and_bonus, depth, orthogonal, position, put
from rwkv_core.models.remake import Remake
from rwkv_core.models.skeleton import RWKV, Linear, Shape, layers_of, mixed, vector, width


@dataclass(frozen=True)
class Shape6(Shape):
    """Sizes."""

    mix_rank: int
    """D: hidden size of time_maa_w1, time_maa_w2."""
    decay_rank: int
    """Hidden size of time_decay_w1, time_decay_w2."""


class TimeMix(nn.Module):
    """Attention's place: reads the past through the WKV state."""

    parts = 1
    """See `RWKV.spare`."""

    def __init__(self, s: Shape6, layer: int, op: Op) -> None:
        super().__init__()
        self.head_size, self.op = s.head_size, op
        c, heads = s.n_embd, s.dim_att // s.head_size
        self.time_maa_x, self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g = (
            vector(c) for _ in range(6)
        )
        self.time_maa_w1 = nn.Parameter(torch.empty(c, 5 * s.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, s.mix_rank, c))
        self.time_decay = vector(s.dim_att)
        self.time_decay_w1 = nn.Parameter(torch.empty(c, s.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(s.decay_rank, s.dim_att))
        self.time_faaaa = nn.Parameter(torch.empty(heads, s.head_size))
        self.receptance, self.key, self.value = (Linear(c, s.dim_att) for _ in range(3))
        self.output = Linear(s.dim_att, c)
        self.gate = Linear(c, s.dim_att)
        self.ln_x = nn.GroupNorm(heads, s.dim_att, eps=s.group_norm_eps)

    def forward(
        self, x: Tensor, norm: Norm, v_first: None, last: Tensor, state: Tensor, remake: Remake
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """(B, T, C), its norm, None, shift and WKV state -> output, None, shift and WKV state."""
        batch, time, _ = x.shape
        mus = torch.zeros_like(self.time_maa_x), torch.ones_like(self.time_maa_x), self.time_maa_x
        with torch.autocast(x.device.type, enabled=False):  # these are not for a matrix yet: they keep their precision
            x, before, xx, last = remake(lambda x, last: mixed(x, last, mus, norm, self.op), x, last)
        delta = remake(torch.sub, before, x)
        # how far each of five inputs moves towards the token before: a fixed part and one that depends on the data
        hidden = torch.tanh(products.linear(xx, self.time_maa_w1.mT)).view(batch * time, 5, -1)
        xw, xk, xv, xr, xg = remake(_moved, x, delta, *remake(self._shares, hidden))

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w_raw = low_rank(xw, self.time_decay_w1, self.time_decay_w2, self.time_decay, "tanh", remake=remake)
        r, k, v, w_raw = (z.view(batch, time, -1, self.head_size) for z in (r, k, v, w_raw))
        y, state = in_parts(
            lambda r, k, v, w, state: wkv6(r, k, v, w, self.time_faaaa, state, op=self.op),
            self.parts,
            (r, k, v, w_raw),
            state,
        )
        y = remake(torch.mul, remake(self._normed, y), remake(F.silu, self.gate(xg)))
        return self.output(y), v_first, last, state

    def _shares(self, hidden: Tensor) -> tuple[Tensor, ...]:
        moves = torch.bmm(hidden.transpose(0, 1), self.time_maa_w2)
        fixed = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return tuple(mu + move for mu, move in zip(fixed, moves, strict=True))

    def _normed(self, y: Tensor) -> Tensor:
        normed: Tensor = self.ln_x(y.flatten(0, 1).flatten(1))
        return normed.view(*y.shape[:2], -1)


def _moved(x: Tensor, delta: Tensor, *shares: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.addcmul(x, delta, share.view_as(x)) for share in shares)


class ChannelMix(nn.Module):
    """The feed-forward part: a squared ReLU between two matrices, behind a gate."""

    def __init__(self, s: Shape, layer: int, op: Op) -> None:
        super().__init__()
        self.op = op
        self.time_maa_k, self.time_maa_r = vector(s.n_embd), vector(s.n_embd)
        self.key = Linear(s.n_embd, s.dim_ffn)
        self.receptance = Linear(s.n_embd, s.n_embd)
        self.value = Linear(s.dim_ffn, s.n_embd)

    def forward(self, x: Tensor, norm: Norm, last: Tensor, remake: Remake) -> tuple[Tensor, Tensor]:
        """(B, T, C), its norm and the shift state -> (B, T, C) and the shift state."""
        mus = self.time_maa_k, self.time_maa_r
        xk, xr, last = remake(lambda x, last: mixed(x, last, mus, norm, self.op), x, last)
        gate = torch.sigmoid(self.receptance(xr))
        return gate * self.value(relu_squared(self.key(xk), op=self.op)), last


class RWKV6(RWKV):
    """The whole model."""

    config: Shape6
    time_mix, channel_mix = TimeMix, ChannelMix
    rates = {"att.time_decay": 2.0}  # noqa: RUF012 (declared a ClassVar above)

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor], head_size_divisor: float) -> Shape6:
        """See `RWKV.shape_of`."""
        dim_att = width(tensors, "blocks.0.att.key.weight", 0)
        heads, head_size = (width(tensors, "blocks.0.att.time_faaaa", i) for i in (0, 1))
        if not head_size or heads * head_size != dim_att:
            raise ValueError(
                f"blocks.0.att.time_faaaa is ({heads}, {head_size}); its heads must share {dim_att} channels"
            )
        return Shape6(
            version="6",
            n_layer=layers_of(tensors),
            n_embd=width(tensors, "emb.weight", 1),
            dim_att=dim_att,
            dim_ffn=width(tensors, "blocks.0.ffn.key.weight", 0),
            head_size=head_size,
            vocab_size=width(tensors, "emb.weight", 0),
            head_size_divisor=head_size_divisor,
            mix_rank=width(tensors, "blocks.0.att.time_maa_w2", 1, dimensions=3),
            decay_rank=width(tensors, "blocks.0.att.time_decay_w1", 1),
        )

    @classmethod
    def new_shape(cls, n_layer: int, n_embd: int, head_size: int, vocab_size: int) -> Shape6:
        """See `RWKV.new_shape`. From 4096 channels on, the ranks are doubled."""
        wide = 2 if n_embd >= 4096 else 1
        ffn = int(3.5 * n_embd) // 32 * 32
        return Shape6("6", n_layer, n_embd, n_embd, ffn, head_size, vocab_size, 8.0, 32 * wide, 64 * wide)

    def initialize_block(self, block: Any, layer: int, generator: torch.Generator) -> None:
        """See `RWKV.initialize_block`."""
        att, ffn, s = block.att, block.ffn, self.config
        deep, fade = depth(layer, s.n_layer)
        at = position(s.n_embd)
        for mu in (att.time_maa_x, att.time_maa_w, att.time_maa_k):
            put(mu, 1 - at**fade)
        put(att.time_maa_v, 1 - (at**fade + 0.3 * deep))
        for mu in (att.time_maa_r, att.time_maa_g):
            put(mu, 1 - at ** (0.5 * fade))
        for mu in (ffn.time_maa_k, ffn.time_maa_r):
            put(mu, 1 - at ** (fade**3))
        decay_and_bonus(att, s, deep)
        for down, up in ((att.time_maa_w1, att.time_maa_w2), (att.time_decay_w1, att.time_decay_w2)):
            down.zero_()
            up.uniform_(-0.01, 0.01, generator=generator)
        gains = {att.receptance: 1.0, att.key: 0.1, att.value: 1.0, att.gate: 0.1, att.output: 0.0}
        orthogonal({**gains, ffn.key: 1.0, ffn.value: 0.0, ffn.receptance: 0.0}, generator)
