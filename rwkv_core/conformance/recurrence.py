"""The models' equations in numpy, one block after the other, so that one block's weights are in memory at a time.

These are the second opinion on `rwkv_core.models`, and share nothing with it. Shapes: T tokens, C channels, H heads, N head
size, D a low rank. A state is (H, N, N), rows are values, columns are keys.
Source: what the clients compute: the rwkv package's model.py; web-rwkv's src/runtime/v4.rs to v7.rs and its shaders;
llama.cpp's src/models/rwkv6-base.cpp and rwkv7-base.cpp. The papers: RWKV-7 arXiv:2503.14456, 5 and 6 arXiv:2404.05892,
4 arXiv:2305.13048.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_core.conformance.contents import ROUNDED, Array, Contents

_HEAD_ROWS = 8192
"""Of the head that are read at once."""


@dataclass(frozen=True)
class Habits:
    """In what a client's arithmetic differs from the definition, beside its precision."""

    activations: bool = False
    """What is multiplied by a matrix is first rounded as that matrix is stored: llama.cpp."""
    embedding: bool = False
    """The first layer norm is taken in the precision of the file: the rwkv package, up to RWKV-6."""


def logits(
    model: Contents,
    prompts: Sequence[Sequence[int]],
    dtype: Any,
    *,
    habits: Habits | None = None,
    state: Mapping[str, Array] | None = None,
) -> list[Array]:
    """The logits behind each token of each prompt: (T, V) each.

    Args:
        model: a file's contents.
        prompts: token ids, one or more in each.
        dtype: to compute in, float32 or float64.
        habits: compute as a client does that has them; None: as the model is defined.
        state: what the blocks begin from, by the names of a state file; none: nothing.
    """
    if habits is None:
        model = model.exact()
    return _Pass(model, dtype, habits, state or {}, [len(prompt) for prompt in prompts]).run(
        np.concatenate([np.asarray(prompt) for prompt in prompts])
    )


class _Pass:
    """One run through a model."""

    def __init__(
        self, model: Contents, dtype: Any, habits: Habits | None, state: Mapping[str, Array], lengths: Sequence[int]
    ) -> None:
        self.model, self.dtype, self.habits, self.state = model, dtype, habits, state
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths

    def run(self, tokens: Array) -> list[Array]:
        """All tokens of all prompts -> logits of each prompt."""
        x = self.model.tensors["emb.weight"].values(tokens).astype(self.dtype)
        x = self.norm(x, "blocks.0.ln0")
        if self.habits and self.habits.embedding:
            x = ROUNDED[self.model.tensors["emb.weight"].kind](x.astype(np.float32)).astype(self.dtype)
        attention = {"4": self.time_mix_4, "5": self.time_mix_5, "6": self.time_mix_6, "7": self.time_mix_7}
        self.first_value: Array | None = None
        for i in range(self.model.n_layer):
            block = f"blocks.{i}"
            # files for clients that halve the stream have these matrices halved as often
            often = 2.0 ** (i // self.model.rescale) if self.model.rescale else 1.0
            back = 1.0 if self.habits else often
            x = x + back * attention[self.model.version](f"{block}.att", self.norm(x, f"{block}.ln1"))
            x = x + back * self.channel_mix(f"{block}.ffn", self.norm(x, f"{block}.ln2"))
            if self.habits and self.model.rescale and (i + 1) % self.model.rescale == 0:
                x = x / 2
        x = self.norm(x, "ln_out")
        head = self.model.tensors["head.weight"]
        rows = [slice(at, at + _HEAD_ROWS) for at in range(0, len(head.raw), _HEAD_ROWS)]
        x = self.rounded(x, "head.weight")
        made = np.concatenate([x @ head.values(part).astype(self.dtype).T for part in rows], 1)
        return [made[begin:end] for begin, end in zip(self.begins, self.ends, strict=True)]

    def get(self, name: str) -> Array:
        """A tensor."""
        return self.model.tensors[name].values().astype(self.dtype)

    def vector(self, name: str) -> Array:
        """A tensor of one value a channel."""
        return self.get(name).reshape(-1)

    def rounded(self, x: Array, name: str) -> Array:
        """An input of a matrix, as a client takes it."""
        if self.habits and self.habits.activations:
            return ROUNDED[self.model.tensors[name].kind](x.astype(np.float32)).astype(self.dtype)
        return x

    def linear(self, x: Array, name: str) -> Array:
        """By a matrix (out, in)."""
        return self.rounded(x, name) @ self.get(name).T

    def down_up(self, x: Array, down: str, up: str, activation: Any = None) -> Array:
        """By a pair of low rank, (C, D) and (D, C)."""
        hidden = self.rounded(x, down) @ self.get(down)
        return self.rounded(hidden if activation is None else activation(hidden), up) @ self.get(up)

    def norm(self, x: Array, name: str) -> Array:
        """Layer norm."""
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.dtype(self.model.norm_eps))
        made: Array = unit * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")
        return made

    def group_norm(self, y: Array, name: str) -> Array:
        """(T, H, N) -> (T, C), each head by itself."""
        centred = y - y.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.dtype(self.model.group_eps))
        made: Array = unit.reshape(len(y), -1) * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")
        return made

    def before(self, x: Array) -> Array:
        """Of each token the one before it; zeros before the first of a prompt."""
        shifted = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
        shifted[self.begins] = 0
        return shifted

    def prompts(self) -> list[range]:
        """Positions of each prompt's tokens."""
        return [range(begin, end) for begin, end in zip(self.begins, self.ends, strict=True)]

    def initial(self, att: str, size: int) -> Array:
        """(H, N, N): the state before a prompt."""
        given = self.state.get(f"{att}.time_state")
        if given is not None:
            return given.astype(self.dtype)
        return np.zeros((self.model.heads, size, size), self.dtype)

    def heads(self, x: Array) -> Array:
        """(T, C) -> (T, H, N)."""
        return x.reshape(len(x), self.model.heads, -1)

    def channel_mix(self, ffn: str, x: Array) -> Array:
        """The feed-forward part."""
        past = self.before(x) - x
        if self.model.version == "7":
            return self.linear(
                _relu_squared(self.linear(x + past * self.vector(f"{ffn}.x_k"), f"{ffn}.key.weight")),
                f"{ffn}.value.weight",
            )
        share = self.mixes(ffn, "kr")
        k = _relu_squared(self.linear(x + past * share["k"], f"{ffn}.key.weight"))
        r = _sigmoid(self.linear(x + past * share["r"], f"{ffn}.receptance.weight"))
        return r * self.linear(k, f"{ffn}.value.weight")

    def mixes(self, module: str, which: str) -> dict[str, Array]:
        """How far each input moves to the token before: RWKV-6 stores it, 4 and 5 what stays."""
        if self.model.version == "6":
            return {one: self.vector(f"{module}.time_maa_{one}") for one in which}
        return {one: 1 - self.vector(f"{module}.time_mix_{one}") for one in which}

    def time_mix_4(self, att: str, x: Array) -> Array:
        """RWKV-4."""
        past, share = self.before(x) - x, self.mixes(att, "kvr")
        k, v, r = (
            self.linear(x + past * share[one], f"{att}.{name}.weight")
            for one, name in (("k", "key"), ("v", "value"), ("r", "receptance"))
        )
        decay, bonus = -np.exp(self.vector(f"{att}.time_decay")), self.vector(f"{att}.time_first")
        y = np.empty_like(k)
        for prompt in self.prompts():
            above, below = np.zeros_like(bonus), np.zeros_like(bonus)
            largest = np.full_like(bonus, -1e30)
            for t in prompt:
                top = np.maximum(largest, bonus + k[t])
                old, new = np.exp(largest - top), np.exp(bonus + k[t] - top)
                y[t] = (old * above + new * v[t]) / (old * below + new)
                top = np.maximum(largest + decay, k[t])
                old, new = np.exp(largest + decay - top), np.exp(k[t] - top)
                above, below, largest = old * above + new * v[t], old * below + new, top
        return self.linear(_sigmoid(r) * y, f"{att}.output.weight")

    def time_mix_5(self, att: str, x: Array) -> Array:
        """RWKV-5."""
        gated = f"{att}.gate.weight" in self.model.tensors
        past, share = self.before(x) - x, self.mixes(att, "kvrg" if gated else "kvr")
        r, k, v = (
            self.linear(x + past * share[one], f"{att}.{name}.weight")
            for one, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
        )
        decay = np.exp(-np.exp(self.get(f"{att}.time_decay"))).reshape(self.model.heads, -1)
        if f"{att}.time_faaaa" in self.model.tensors:
            bonus = self.get(f"{att}.time_faaaa").reshape(self.model.heads, -1)
        else:
            bonus = np.exp(self.get(f"{att}.time_first")).reshape(self.model.heads, -1)
        y = self.group_norm(
            self.fading(att, r, k, v, np.broadcast_to(decay, self.heads(k).shape), bonus), f"{att}.ln_x"
        )
        if gated:
            y = y * _silu(self.linear(x + past * share["g"], f"{att}.gate.weight"))
        return self.linear(y, f"{att}.output.weight")

    def time_mix_6(self, att: str, x: Array) -> Array:
        """RWKV-6."""
        past = self.before(x) - x
        down, up = f"{att}.time_maa_w1", f"{att}.time_maa_w2"
        hidden = np.tanh(self.rounded(x + past * self.vector(f"{att}.time_maa_x"), down) @ self.get(down))
        hidden = self.rounded(hidden.reshape(len(x), 5, -1), up)
        moves = np.einsum("tid,idc->itc", hidden, self.get(up))
        share = self.mixes(att, "wkvrg")
        xw, xk, xv, xr, xg = (x + past * (share[one] + move) for one, move in zip("wkvrg", moves, strict=True))
        raw = self.down_up(xw, f"{att}.time_decay_w1", f"{att}.time_decay_w2", np.tanh) + self.vector(
            f"{att}.time_decay"
        )
        r, k, v = (
            self.linear(one, f"{att}.{name}.weight") for one, name in ((xr, "receptance"), (xk, "key"), (xv, "value"))
        )
        bonus = self.get(f"{att}.time_faaaa").reshape(self.model.heads, -1)
        y = self.group_norm(self.fading(att, r, k, v, self.heads(np.exp(-np.exp(raw))), bonus), f"{att}.ln_x")
        return self.linear(y * _silu(self.linear(xg, f"{att}.gate.weight")), f"{att}.output.weight")

    def fading(self, att: str, r: Array, k: Array, v: Array, decay: Array, bonus: Array) -> Array:
        """RWKV-5's and 6's recurrence: (T, C) each, decay (T, H, N) -> (T, H, N)."""
        r, k, v = (self.heads(z) for z in (r, k, v))
        y = np.empty_like(v)
        for prompt in self.prompts():
            state = self.initial(att, v.shape[-1])
            for t in prompt:
                new = v[t][:, :, None] * k[t][:, None, :]
                y[t] = np.einsum("hvk,hk->hv", state + new * bonus[:, None, :], r[t])
                state = state * decay[t][:, None, :] + new
        return y

    def time_mix_7(self, att: str, x: Array) -> Array:
        """RWKV-7."""
        past = self.before(x) - x
        xr, xw, xk, xv, xa, xg = (x + past * self.vector(f"{att}.x_{one}") for one in "rwkvag")
        r, k, v = (
            self.linear(one, f"{att}.{name}.weight") for one, name in ((xr, "receptance"), (xk, "key"), (xv, "value"))
        )
        raw = self.vector(f"{att}.w0") + self.down_up(xw, f"{att}.w1", f"{att}.w2", np.tanh)
        decay = self.heads(np.exp(self.dtype(-self.model.decay) * _sigmoid(raw)))
        rate = _sigmoid(self.vector(f"{att}.a0") + self.down_up(xa, f"{att}.a1", f"{att}.a2"))
        gate = self.down_up(xg, f"{att}.g1", f"{att}.g2", _sigmoid)
        if self.first_value is None:
            self.first_value = v
        else:
            share = _sigmoid(self.vector(f"{att}.v0") + self.down_up(xv, f"{att}.v1", f"{att}.v2"))
            v = v + (self.first_value - v) * share
        removed = self.heads(k * self.vector(f"{att}.k_k"))
        removed = removed / np.maximum(np.sqrt((removed**2).sum(-1, keepdims=True)), self.dtype(1e-12))
        k = k * (1 + (rate - 1) * self.vector(f"{att}.k_a"))
        r, k, v, rate = (self.heads(z) for z in (r, k, v, rate))
        y = np.empty_like(v)
        for prompt in self.prompts():
            state = self.initial(att, v.shape[-1])
            for t in prompt:
                taken = np.einsum("hvk,hk->hv", state, -removed[t])
                state = (
                    state * decay[t][:, None, :]
                    + taken[:, :, None] * (removed[t] * rate[t])[:, None, :]
                    + v[t][:, :, None] * k[t][:, None, :]
                )
                y[t] = np.einsum("hvk,hk->hv", state, r[t])
        own = (r * k * self.heads(self.vector(f"{att}.r_k")[None])).sum(-1, keepdims=True) * v
        y = self.group_norm(y, f"{att}.ln_x") + own.reshape(len(x), -1)
        return self.linear(y * gate, f"{att}.output.weight")


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu_squared(x: Array) -> Array:
    return np.maximum(x, 0) ** 2
