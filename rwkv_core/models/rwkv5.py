"""RWKV-5 "Eagle": a matrix of values by keys for a state, which fades by a fixed rate.

Three versions were published. 5.0: one decay and one bonus a head, no gate. 5.1: a gate. 5.2: decay and bonus by channel.
Shapes: B batch, T time, C channels, H heads, N head size.
Source: Peng et al. 2024, "Eagle and Finch", arXiv:2404.05892; initial values and learning-rate groups: BlinkDL/RWKV-LM, RWKV-v5
(5.2) and RWKV-v4neo (5.0 and 5.1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choice import Op
from kernels.recurrence import in_parts
from kernels.token_shift import Norm
from kernels.wkv6 import wkv6
from rwkv_core.models.initial import decay_and_bonus, depth, orthogonal, position, put, token_shift
from rwkv_core.models.remake import Remake
from rwkv_core.models.rwkv4 import ChannelMix
from rwkv_core.models.skeleton import RWKV, Linear, Shape, layers_of, mixed, vector, width


@dataclass(frozen=True)
class Shape5(Shape):
    """Sizes, and in what the versions differ."""

    bonus: str
    """Name of the parameter: time_faaaa, or in some of 5.0 and 5.1 time_first, which holds its logarithm."""

    @property
    def gated(self) -> bool:
        """Whether time mixing has a gate."""
        return self.version != "5.0"

    @property
    def by_channel(self) -> bool:
        """Whether decay and bonus are (H, N) rather than (H,)."""
        return self.version == "5.2"


class TimeMix(nn.Module):
    """Attention's place: reads the past through the WKV state."""

    parts = 1
    """See `RWKV.spare`."""

    def __init__(self, s: Shape5, layer: int, op: Op) -> None:
        super().__init__()
        self.head_size, self.gated, self.op = s.head_size, s.gated, op
        heads = s.dim_att // s.head_size
        size = (heads, s.head_size) if s.by_channel else (heads,)
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (vector(s.n_embd) for _ in range(3))
        if s.gated:
            self.time_mix_g = vector(s.n_embd)
        self.time_decay = nn.Parameter(torch.empty(size))
        self.register_parameter(s.bonus, nn.Parameter(torch.empty(size)))
        self.receptance, self.key, self.value = (Linear(s.n_embd, s.dim_att) for _ in range(3))
        self.output = Linear(s.dim_att, s.n_embd)
        if s.gated:
            self.gate = Linear(s.n_embd, s.dim_att)
        self.ln_x = nn.GroupNorm(heads, s.dim_att, eps=s.group_norm_eps)

    def forward(
        self, x: Tensor, norm: Norm, v_first: None, last: Tensor, state: Tensor, remake: Remake
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """(B, T, C), its norm, None, shift and WKV state -> output, None, shift and WKV state."""
        batch, time, _ = x.shape
        own = (self.time_mix_k, self.time_mix_v, self.time_mix_r, *((self.time_mix_g,) if self.gated else ()))
        mus = [1 - mu for mu in own]
        xk, xv, xr, *xg, last = remake(lambda x, last: mixed(x, last, mus, norm, self.op), x, last)
        r, k, v = (z.view(batch, time, -1, self.head_size) for z in (self.receptance(xr), self.key(xk), self.value(xv)))
        decay = self._by_channel(self.time_decay).expand_as(r)
        bonus = self._bonus()
        y, state = in_parts(
            lambda r, k, v, w, state: wkv6(r, k, v, w, bonus, state, op=self.op), self.parts, (r, k, v, decay), state
        )
        y = remake(self._normed, y)
        if self.gated:
            y = remake(torch.mul, y, remake(F.silu, self.gate(*xg)))
        return self.output(y), v_first, last, state

    def _normed(self, y: Tensor) -> Tensor:
        normed: Tensor = self.ln_x(y.flatten(0, 1).flatten(1))
        return normed.view(*y.shape[:2], -1)

    def _by_channel(self, x: Tensor) -> Tensor:
        """(H,) or (H, N) -> (H, N)."""
        return x if x.ndim == 2 else x[:, None].expand(-1, self.head_size)

    def _bonus(self) -> Tensor:
        named = dict(self.named_parameters(recurse=False))
        if "time_faaaa" in named:
            return self._by_channel(named["time_faaaa"])
        log = named["time_first"]
        return self._by_channel((log.float() if log.dtype.itemsize < 4 else log).exp())


class RWKV5(RWKV):
    """The whole model."""

    config: Shape5
    time_mix, channel_mix = TimeMix, ChannelMix
    rates = {"att.time_decay": 2.0, "att.time_first": 3.0}  # noqa: RUF012 (declared a ClassVar above)

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor], head_size_divisor: float) -> Shape5:
        """See `RWKV.shape_of`."""
        decay = tensors["blocks.0.att.time_decay"].shape
        dim_att = width(tensors, "blocks.0.att.key.weight", 0)
        version = "5.0" if "blocks.0.att.gate.weight" not in tensors else "5.1" if len(decay) == 1 else "5.2"
        if len(decay) not in (1, 2) or not decay[0] or dim_att % decay[0]:
            raise ValueError(f"blocks.0.att.time_decay is {tuple(decay)}; its heads must share {dim_att} channels")
        return Shape5(
            version=version,
            n_layer=layers_of(tensors),
            n_embd=width(tensors, "emb.weight", 1),
            dim_att=dim_att,
            dim_ffn=width(tensors, "blocks.0.ffn.key.weight", 0),
            head_size=dim_att // decay[0],
            vocab_size=width(tensors, "emb.weight", 0),
            head_size_divisor=head_size_divisor,
            bonus="time_first" if "blocks.0.att.time_first" in tensors else "time_faaaa",
        )

    @classmethod
    def new_shape(cls, n_layer: int, n_embd: int, head_size: int, vocab_size: int, version: str = "5.2") -> Shape5:
        """See `RWKV.new_shape`; 5.0 and 5.1 were previews."""
        ffn = 4 * n_embd if version != "5.2" else int(3.5 * n_embd) // 32 * 32
        bonus = "time_first" if version == "5.0" else "time_faaaa"
        return Shape5(version, n_layer, n_embd, n_embd, ffn, head_size, vocab_size, 8.0, bonus)

    def initialize_block(self, block: Any, layer: int, generator: torch.Generator) -> None:
        """See `RWKV.initialize_block`."""
        att, ffn, s = block.att, block.ffn, self.config
        deep, fade = depth(layer, s.n_layer)
        token_shift(att, ffn, s, layer)
        if s.gated:
            put(att.time_mix_g, position(s.n_embd) ** (0.5 * fade))
        decay_and_bonus(att, s, deep)
        if s.by_channel:
            gains = {att.key: 0.1, att.gate: 0.1, ffn.key: 1.0}
        else:
            gains = {att.key: 1.0, ffn.key: math.sqrt(s.dim_ffn / s.n_embd)} | ({att.gate: 1.0} if s.gated else {})
        gains |= {att.receptance: 1.0, att.value: 1.0, att.output: 0.0, ffn.value: 0.0, ffn.receptance: 0.0}
        orthogonal(gains, generator)
