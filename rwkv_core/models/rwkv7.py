"""RWKV-7 "Goose": a recurrent language model whose state learns by a generalised delta rule.

Shapes: B batch, T time, C channels, H heads, N head size.
Source: Peng et al. 2025, arXiv:2503.14456; initial values and learning-rate groups: BlinkDL/RWKV-LM, RWKV-v7/train_temp.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.block7 import Parameters, blocks
from kernels.channel_mix import relu_squared
from kernels.choice import Op, direct
from kernels.linear import ROWS, low_rank
from kernels.recurrence import in_parts
from kernels.time_mix7 import prepare, readout
from kernels.token_shift import Norm
from kernels.wkv7 import wkv7
from rwkv_core.models.initial import depth, orthogonal, position, put, ramp
from rwkv_core.models.remake import Remake
from rwkv_core.models.skeleton import RWKV, Linear, Shape, layers_of, mixed, vector, width
from rwkv_core.models.state import BlockState, State


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

    parts = 1
    """See `RWKV.spare`."""

    def __init__(self, s: Shape7, layer: int, op: Op) -> None:
        super().__init__()
        self.head_size, self.op = s.head_size, op
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
        self.receptance, self.key, self.value, self.output = (Linear(c, c) for _ in range(4))
        self.ln_x = nn.GroupNorm(heads, c, eps=s.group_norm_eps)

    def forward(
        self, x: Tensor, norm: Norm, v_first: Tensor | None, last: Tensor, state: Tensor, remake: Remake
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, C), its norm, layer 0's value (None in layer 0), shift and WKV state -> output, that value, both states."""
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg, last = remake(lambda x, last: mixed(x, last, mixes, norm, self.op), x, last)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w_raw = low_rank(xw, self.w1, self.w2, self.w0, "tanh", remake=remake)
        a_raw = low_rank(xa, self.a1, self.a2, self.a0, remake=remake)  # in-context learning rate
        g = low_rank(xg, self.g1, self.g2, None, "sigmoid", remake=remake)
        share = None  # of the value of layer 0
        if v_first is not None:
            share = low_rank(xv, self.v1, self.v2, self.v0, remake=remake)
        first = v if v_first is None else v_first
        k, v, a, b = remake(self._prepare, k, v, v_first, a_raw, share)
        r, w_raw = (z.unflatten(-1, (-1, self.head_size)) for z in (r, w_raw))
        y, state = in_parts(partial(wkv7, op=self.op), self.parts, (r, w_raw, k, v, a, b), state)
        return self.output(remake(self._readout, y, r, k, v, g)), first, last, state

    def _prepare(
        self, k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, share: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return prepare(k0, v0, v_first, a_raw, share, self.k_k, self.k_a, self.head_size, op=self.op)

    def _readout(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        ln = self.ln_x
        return readout(y, r, k, v, g, ln.weight, ln.bias, self.r_k, ln.eps, op=self.op)


class ChannelMix(nn.Module):
    """The feed-forward part: a squared ReLU between two matrices."""

    def __init__(self, s: Shape, layer: int, op: Op) -> None:
        super().__init__()
        self.op = op
        self.x_k = vector(s.n_embd)
        self.key = Linear(s.n_embd, s.dim_ffn)
        self.value = Linear(s.dim_ffn, s.n_embd)

    def forward(self, x: Tensor, norm: Norm, last: Tensor, remake: Remake) -> tuple[Tensor, Tensor]:
        """(B, T, C), its norm and the shift state -> (B, T, C) and the shift state."""
        xk, last = remake(lambda x, last: mixed(x, last, (self.x_k,), norm, self.op), x, last)
        return self.value(relu_squared(self.key(xk), op=self.op)), last


class WholeModel:
    """What one compiled call for a whole token reads of a model, and whether the model is still made of it."""

    def __init__(self, model: nn.Module, layers: Sequence[Any]) -> None:
        modules = [module for layer in layers for module in layer.modules()]
        self._dicts = [d for m in modules for d in (m._modules, m._parameters)]
        self._held = list(self._members())  # held, so that nothing new gets the identity of one of them
        self._identities = list(map(id, self._held))
        self._listeners = [h for m in (model, *modules) for h in (m._forward_hooks, m._forward_pre_hooks)]
        matrices = [
            m for b in layers for m in (b.att.receptance, b.att.key, b.att.value, b.att.output, b.ffn.key, b.ffn.value)
        ]
        self.parameters: list[Parameters] = []
        """Of each block; none if an adapter stands in the place of a matrix, or who listens has perhaps taken them (ZeRO 3)."""
        if all(type(m) is Linear for m in matrices) and not any(self._listeners):
            self.parameters = [Parameters(dict(b.named_parameters()), b.ln1.eps, b.att.ln_x.eps) for b in layers]

    def holds(self) -> bool:
        """Whether no module or tensor was exchanged or moved: 2 % of a token's time."""
        return list(map(id, self._members())) == self._identities and all([p.unchanged() for p in self.parameters])

    def _members(self) -> Iterator[object]:
        return itertools.chain.from_iterable(map(dict.values, self._dicts))

    def applies(self) -> bool:
        """Whether nothing stands in the place of a matrix, and nobody listens to a module."""
        return bool(self.parameters) and not any(self._listeners)


class RWKV7(RWKV):
    """The whole model."""

    config: Shape7
    time_mix, channel_mix = TimeMix, ChannelMix
    rates = {"att.w0": 2.0}  # noqa: RUF012 (declared a ClassVar above)

    def __init__(self, shape: Shape, op: Op = "auto") -> None:
        """See `RWKV`."""
        super().__init__(shape, op)
        self._whole: WholeModel | None = None

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `RWKV.features`. One token of a few sequences is one call of compiled code."""
        few = tokens.shape[1] == 1 and len(tokens) <= ROWS
        if (
            not few
            or self.shared
            or torch.is_grad_enabled()
            or self._op not in ("auto", "cpu")
            or not direct("block7", self.emb.weight)
        ):
            return super().features(tokens, state)
        if self._whole is None or not self._whole.holds():
            self._whole = WholeModel(self, list(self.blocks))
        if not self._whole.applies():
            return super().features(tokens, state)
        state = self.initial_state(len(tokens)) if state is None else state
        ln0: Any = self.blocks[0].ln0
        x, after = blocks(ln0(self.emb(tokens[:, 0])), state, self._whole.parameters)
        return self.ln_out(x)[:, None], [BlockState(*block) for block in after]

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor], head_size_divisor: float) -> Shape7:
        """See `RWKV.shape_of`."""
        n_layer, n_embd = layers_of(tensors), width(tensors, "emb.weight", 1)
        heads, head_size = (width(tensors, "blocks.0.att.r_k", i) for i in (0, 1))
        if not head_size or heads * head_size != n_embd:
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
