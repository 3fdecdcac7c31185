"""RWKV-4: attention as a weighted mean of all values before, whose weights fade by channel.

Shapes: B batch, T time, C channels. There are no heads.
Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048; initial values and learning-rate
groups: BlinkDL/RWKV-LM, RWKV-v4neo.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.channel_mix import relu_squared
from kernels.choice import Op
from kernels.recurrence import in_parts
from kernels.token_shift import Norm
from kernels.wkv4 import NOTHING, wkv4
from rwkv_core.models.initial import depth, orthogonal, put, ramp, token_shift
from rwkv_core.models.remake import Remake
from rwkv_core.models.skeleton import RWKV, Linear, Shape, layers_of, mixed, vector, width


class TimeMix(nn.Module):
    """Attention's place: reads the past through the WKV state."""

    parts = 1
    """See `RWKV.spare`."""

    def __init__(self, s: Shape, layer: int, op: Op) -> None:
        super().__init__()
        self.op = op
        self.time_decay, self.time_first = nn.Parameter(torch.empty(s.dim_att)), nn.Parameter(torch.empty(s.dim_att))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (vector(s.n_embd) for _ in range(3))
        self.key, self.value, self.receptance = (Linear(s.n_embd, s.dim_att) for _ in range(3))
        self.output = Linear(s.dim_att, s.n_embd)

    def forward(
        self, x: Tensor, norm: Norm, v_first: None, last: Tensor, state: Tensor, remake: Remake
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """(B, T, C), its norm, None, shift and WKV state -> output, None, shift and WKV state."""
        mus = [1 - own for own in (self.time_mix_k, self.time_mix_v, self.time_mix_r)]
        xk, xv, xr, last = remake(lambda x, last: mixed(x, last, mus, norm, self.op), x, last)
        y, state = in_parts(
            lambda k, v, state: wkv4(k, v, self.time_decay, self.time_first, state, op=self.op),
            self.parts,
            (self.key(xk), self.value(xv)),
            state,
        )
        gate = torch.sigmoid(self.receptance(xr))
        return self.output(remake(torch.mul, gate, y)), v_first, last, state


class ChannelMix(nn.Module):
    """The feed-forward part: a squared ReLU between two matrices, behind a gate. RWKV-5's too."""

    def __init__(self, s: Shape, layer: int, op: Op) -> None:
        super().__init__()
        self.op = op
        self.time_mix_k, self.time_mix_r = vector(s.n_embd), vector(s.n_embd)
        self.key = Linear(s.n_embd, s.dim_ffn)
        self.receptance = Linear(s.n_embd, s.n_embd)
        self.value = Linear(s.dim_ffn, s.n_embd)

    def forward(self, x: Tensor, norm: Norm, last: Tensor, remake: Remake) -> tuple[Tensor, Tensor]:
        """(B, T, C), its norm and the shift state -> (B, T, C) and the shift state."""
        mus = 1 - self.time_mix_k, 1 - self.time_mix_r
        xk, xr, last = remake(lambda x, last: mixed(x, last, mus, norm, self.op), x, last)
        gate = torch.sigmoid(self.receptance(xr))
        return gate * self.value(relu_squared(self.key(xk), op=self.op)), last


class RWKV4(RWKV):
    """The whole model."""

    time_mix, channel_mix = TimeMix, ChannelMix
    rates = {"att.time_decay": 2.0, "att.time_first": 3.0}  # noqa: RUF012 (declared a ClassVar above)

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor], head_size_divisor: float) -> Shape:
        """See `RWKV.shape_of`."""
        return Shape(
            version="4",
            n_layer=layers_of(tensors),
            n_embd=width(tensors, "emb.weight", 1),
            dim_att=width(tensors, "blocks.0.att.key.weight", 0),
            dim_ffn=width(tensors, "blocks.0.ffn.key.weight", 0),
            head_size=1,
            vocab_size=width(tensors, "emb.weight", 0),
            head_size_divisor=head_size_divisor,
        )

    @classmethod
    def new_shape(cls, n_layer: int, n_embd: int, head_size: int, vocab_size: int) -> Shape:
        """See `RWKV.new_shape`. There are no heads: `head_size` has no meaning here."""
        return Shape("4", n_layer, n_embd, n_embd, 4 * n_embd, 1, vocab_size, 8.0)

    def initial_wkv(self, batch: int) -> Tensor:
        """(B, 3, C): sums of 0, and the exponent that they are scaled by."""
        state = self.ln_out.weight.new_zeros(batch, 3, self.config.dim_att, dtype=torch.float32)
        state[:, 2] = NOTHING
        return state

    def initialize_block(self, block: Any, layer: int, generator: torch.Generator) -> None:
        """See `RWKV.initialize_block`."""
        att, ffn, s = block.att, block.ffn, self.config
        deep, _ = depth(layer, s.n_layer)
        token_shift(att, ffn, s, layer)
        put(att.time_decay, -5 + 8 * ramp(s.dim_att) ** (0.7 + 1.3 * deep))
        put(att.time_first, math.log(0.3) + 0.5 * ((torch.arange(s.dim_att) + 1) % 3 - 1))
        gains = {att.key: 0.0, att.receptance: 0.0, att.value: 1.0, att.output: 0.0}
        orthogonal({**gains, ffn.key: math.sqrt(s.dim_ffn / s.n_embd), ffn.value: 0.0, ffn.receptance: 0.0}, generator)
