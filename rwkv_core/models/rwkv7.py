"""RWKV-7 (x070): a recurrent language model whose state learns by a generalised delta rule.

Module names are the checkpoint's names, so `state_dict()` is the official checkpoint.
Shapes: B batch, T time, C channels, H heads, N head size, V vocabulary.
Source: Peng et al. 2025, arXiv:2503.14456; initial values and learning-rate groups: BlinkDL/RWKV-LM, RWKV-v7/train_temp.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.wkv7 import Op, choose, wkv7
from rwkv_core.checkpoint import Shape

GROUP_NORM_EPS = 64e-5
"""Of ln_x: 1e-5 times the square of the head size divisor 8."""


class BlockState(NamedTuple):
    """What one block carries from token to token."""

    att_shift: Tensor
    """(B, C): what time mixing read last, layer-normed."""
    wkv: Tensor
    """(B, H, N, N) float32: rows are values, columns are keys."""
    ffn_shift: Tensor
    """(B, C): what channel mixing read last, layer-normed."""


State = list[BlockState]


def shift(x: Tensor, last: Tensor) -> Tensor:
    """The token before each: (B, T, C), with `last` (B, C) before the first."""
    return torch.cat((last[:, None], x[:, :-1]), 1)


class TimeMix(nn.Module):
    """Attention's place: reads the past through the WKV state."""

    def __init__(self, s: Shape, layer: int, op: Op) -> None:
        super().__init__()
        self.layer, self.head_size, self.op = layer, s.head_size, op
        c, heads = s.n_embd, s.n_embd // s.head_size

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, c))

        def pair(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(c, rank)), nn.Parameter(torch.empty(rank, c))

        # in the order of the released files: converters read x_r to x_g by it
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in range(6))
        self.w0 = vector()
        self.r_k = nn.Parameter(torch.empty(heads, s.head_size))
        self.w1, self.w2 = pair(s.decay_rank)
        self.a1, self.a2 = pair(s.a_rank)
        self.a0 = vector()
        self.g1, self.g2 = pair(s.gate_rank)
        if layer > 0 or s.value_residual_in_layer_0:
            v1, v2 = pair(s.v_rank)
            self.v2, self.v1 = v2, v1
            self.v0 = vector()
        self.k_k, self.k_a = vector(), vector()
        self.receptance, self.key, self.value, self.output = (nn.Linear(c, c, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(heads, c, eps=GROUP_NORM_EPS)

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

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, s.n_embd))
        self.key = nn.Linear(s.n_embd, s.dim_ffn, bias=False)
        self.value = nn.Linear(s.dim_ffn, s.n_embd, bias=False)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """(B, T, C) and the shift state -> (B, T, C)."""
        hidden: Tensor = self.key(x + (shift(x, last) - x) * self.x_k)
        output: Tensor = self.value(torch.relu(hidden) ** 2)
        return output


class Block(nn.Module):
    """Time mixing, then channel mixing, each on a residual branch."""

    def __init__(self, s: Shape, layer: int, op: Op) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(s.n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(s.n_embd), nn.LayerNorm(s.n_embd)
        self.att, self.ffn = TimeMix(s, layer, op), ChannelMix(s)

    def forward(self, x: Tensor, v_first: Tensor | None, state: BlockState) -> tuple[Tensor, Tensor, BlockState]:
        """(B, T, C) -> (B, T, C); also the value of layer 0 and the state after the last token."""
        if v_first is None:
            x = self.ln0(x)
        z = self.ln1(x)
        mixed, v_first, wkv = self.att(z, v_first, state.att_shift, state.wkv)
        x = x + mixed
        zz = self.ln2(x)
        x = x + self.ffn(zz, state.ffn_shift)
        return x, v_first, BlockState(z[:, -1], wkv, zz[:, -1])


class RWKV7(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape, op: Op = "auto") -> None:
        """Build the modules for `shape`; their values are not set: load a checkpoint, or call `initialize`."""
        super().__init__()
        self.config, self._op = shape, op
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, layer, op) for layer in range(shape.n_layer))
        self.ln_out = nn.LayerNorm(shape.n_embd)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)

    def wkv_implementation(self, steps: int) -> str:
        """Which form of the WKV operator runs on sequences of `steps` tokens."""
        return choose(self._op, steps)

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros."""
        s, like = self.config, self.ln_out.weight
        heads = s.n_embd // s.head_size
        return [
            BlockState(
                like.new_zeros(batch, s.n_embd),
                like.new_zeros(batch, heads, s.head_size, s.head_size, dtype=torch.float32),
                like.new_zeros(batch, s.n_embd),
            )
            for _ in range(s.n_layer)
        ]

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head reads: tokens (B, T) int64 -> (B, T, C), and the state after the last token."""
        state = self.initial_state(len(tokens)) if state is None else state
        x, v_first, after = self.emb(tokens), None, []
        for block, before in zip(self.blocks, state, strict=True):
            x, v_first, last = block(x, v_first, before)
            after.append(last)
        return self.ln_out(x), after

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Tokens (B, T) int64 -> logits (B, T, V), and the state after the last token.

        A sequence run whole, in slices that pass the state on, or token by token has the same logits.
        """
        x, state = self.features(tokens, state)
        return self.head(x), state

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer groups of the official pretraining: decay on the large matrices, and att.w0 at twice the rate."""
        decayed, fast, plain = [], [], []
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            if name.endswith("att.w0"):
                fast.append(p)
            elif p.squeeze().ndim >= 2 and ".weight" in name:
                decayed.append(p)
            else:
                plain.append(p)
        return [
            {"params": decayed, "lr": lr, "weight_decay": weight_decay},
            {"params": plain, "lr": lr, "weight_decay": 0.0},
            {"params": fast, "lr": 2 * lr, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set every value as the official pretraining does."""
        s = self.config
        self.emb.weight.uniform_(-1e-4, 1e-4, generator=generator)
        head_gain = 0.5 * math.sqrt(s.vocab_size / s.n_embd) if s.vocab_size > s.n_embd else 0.5
        nn.init.orthogonal_(self.head.weight, gain=head_gain, generator=generator)
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.fill_(1)
                norm.bias.zero_()
        for layer, block in enumerate(self.blocks):
            _initialize_block(block, layer, s, generator)


def new_shape(n_layer: int, n_embd: int, head_size: int, vocab_size: int) -> Shape:
    """Sizes of a new model: the low ranks follow the official rule for training from scratch."""

    def rank(factor: float) -> int:
        return max(32, 32 * round(factor * math.sqrt(n_embd) / 32))

    return Shape(
        "7", n_layer, n_embd, head_size, vocab_size, 4 * n_embd,
        decay_rank=rank(2.5), a_rank=rank(2.5), v_rank=rank(1.7), gate_rank=rank(5), value_residual_in_layer_0=False,
    )  # fmt: skip


def _initialize_block(block: Any, layer: int, s: Shape, generator: torch.Generator) -> None:
    att, ffn, c = block.att, block.ffn, s.n_embd
    depth = layer / max(s.n_layer - 1, 1)  # 0 in the first layer, 1 in the last
    fade = 1 - layer / s.n_layer  # 1 in the first layer, towards 0
    n = torch.arange(c, dtype=torch.float32)
    position = n / c
    linear = n / max(c - 1, 1) - 0.5
    zigzag = (n % s.head_size - (s.head_size - 1) / 2) / ((s.head_size - 1) / 2)
    zigzag = zigzag * zigzag.abs()

    def put(parameter: nn.Parameter, value: Tensor | float) -> None:
        parameter.copy_(torch.as_tensor(value, dtype=torch.float32).expand(c).view_as(parameter))

    for parameter, power in (
        (att.x_r, 0.2), (att.x_w, 0.9), (att.x_k, 0.7), (att.x_v, 0.7), (att.x_a, 0.9), (att.x_g, 0.2)
    ):  # fmt: skip
        put(parameter, 1 - position ** (power * fade))
    put(ffn.x_k, 1 - position ** (fade**4))
    put(att.w0, -6 + 6 * (n / max(c - 1, 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    put(att.a0, -0.19 + 0.3 * zigzag + 0.4 * linear)
    put(att.k_k, 0.71 - 0.1 * linear)
    put(att.k_a, 1.02)
    att.r_k.fill_(-0.04)
    if hasattr(att, "v0"):
        put(att.v0, 0.73 - 0.4 * linear)
    for name in ("w", "a", "g", "v"):
        if hasattr(att, f"{name}1"):
            down, up = getattr(att, f"{name}1"), getattr(att, f"{name}2")
            down.zero_()
            nn.init.orthogonal_(up, gain=0.1 * math.sqrt(max(1.0, up.shape[0] / up.shape[1])), generator=generator)
    for linear_layer, gain in ((att.receptance, 1.0), (att.key, 0.1), (att.value, 1.0), (ffn.key, 1.0)):
        nn.init.orthogonal_(linear_layer.weight, gain=gain, generator=generator)
    att.output.weight.zero_()
    ffn.value.weight.zero_()
    att.ln_x.weight.fill_(((1 + layer) / s.n_layer) ** 0.7)
    att.ln_x.bias.zero_()
