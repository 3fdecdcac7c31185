"""Blocks of RWKV-7 for one token of each of a few sequences.

A block is some 70 small operations, and Python takes longer to call each than memory to deliver all the weights. On a CPU
all blocks are one call, whose residual stream is float32. Else, and wherever gradients are asked for, it is the operators
one by one.

Shapes: B batch, C channels, H heads, N head size. Source: Peng et al. 2025, arXiv:2503.14456.
"""

import ctypes
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kernels import build
from kernels.choice import direct
from kernels.linear import ROWS, linear_reference, low_rank_reference
from kernels.time_mix7 import prepare_reference, readout_reference
from kernels.token_shift import Norm, mix_reference
from kernels.wkv7 import wkv7_reference

PAIRS = ("w", "a", "v", "g")

NAMES = (
    "ln1.weight", "ln1.bias", *(f"att.x_{x}" for x in "rwkvag"), *(f"att.{x}1" for x in PAIRS),
    *(f"att.{x}2" for x in PAIRS), "att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k",
    *(f"att.{x}.weight" for x in ("receptance", "key", "value", "output")), "att.ln_x.weight", "att.ln_x.bias",
    "ln2.weight", "ln2.bias", "ffn.x_k", "ffn.key.weight", "ffn.value.weight",
)  # fmt: skip
"""A block's parameters, as checkpoints name them: in the order of the record in csrc/block7.cpp."""

_FIRST_LAYER_LACKS = ("att.v0", "att.v1", "att.v2")


class Parameters:
    """A block's parameters, looked over once for many calls."""

    def __init__(self, tensors: Mapping[str, Tensor], norm_eps: float = 1e-5, group_norm_eps: float = 64e-5) -> None:
        """Take the tensors of NAMES; v0, v1 and v2 may be missing, in layer 0.

        Args:
            tensors: by name; others among them are left out.
            norm_eps: of the two layer norms.
            group_norm_eps: of att.ln_x.
        """
        self.tensors = {name: tensors[name] for name in NAMES if name in tensors or name not in _FIRST_LAYER_LACKS}
        self.norm_eps, self.group_norm_eps = norm_eps, group_norm_eps
        one = self.tensors["att.r_k"]
        self.heads, self.size = one.shape
        self.fits = (
            self.size % 16 == 0
            and all(x.dtype == one.dtype and x.is_contiguous() for x in self.tensors.values())
            and self._sizes_agree()
        )
        """Whether the compiled form takes them."""
        self._addresses = self._lie_at()
        ranks = [self.tensors[f"att.{x}1"].shape[1] if f"att.{x}1" in self.tensors else 0 for x in PAIRS]
        channels, hidden = one.numel(), self.tensors["ffn.key.weight"].shape[0]
        self.channels, self.has_value_residual = channels, ranks[PAIRS.index("v")] > 0
        addresses = dict(zip(self.tensors, self._addresses, strict=True))
        record = struct.pack(
            f"2d8q{len(NAMES)}q", norm_eps, group_norm_eps, channels, self.heads, hidden, *ranks, one.dtype == torch.bfloat16,
            *(addresses.get(name, 0) for name in NAMES),
        )  # fmt: skip
        self._record = ctypes.create_string_buffer(record)
        self._record_at = ctypes.addressof(self._record)

    def unchanged(self) -> bool:
        """Whether the tensors lie in memory where they did: `parameter.data = ...` and `module.to(...)` move them."""
        return self._lie_at() == self._addresses

    def _lie_at(self) -> list[int]:
        return [x.data_ptr() for x in self.tensors.values()]

    def _sizes_agree(self) -> bool:
        c, f = self.tensors["att.r_k"].numel(), self.tensors["ffn.key.weight"].shape[0]
        for name, x in self.tensors.items():
            last = name.split(".")[-1]
            shape = {
                "ffn.key.weight": (f, c), "ffn.value.weight": (c, f), "att.r_k": (self.heads, self.size),
            }.get(name)  # fmt: skip
            if shape is None and name.startswith("att.") and last == "weight" and "ln_x" not in name:
                shape = (c, c)
            if shape is None and last[1:] == "1":
                shape = (c, x.shape[-1])
            if shape is None and last[1:] == "2":
                shape = (self.tensors[f"att.{last[0]}1"].shape[-1], c)
            if x.shape != shape if shape else x.numel() != c:
                return False
        return True


State = tuple[Tensor, Tensor, Tensor]
"""Of one block, (att_shift, wkv, ffn_shift): (B, C), what time mixing read last, layer-normed; (B, H, N, N) float32, rows are
values, columns are keys; (B, C), what channel mixing read last, layer-normed."""


def blocks(x: Tensor, states: Sequence[State], parameters: Sequence[Parameters]) -> tuple[Tensor, list[State]]:
    """One token of each sequence through the blocks of a model, from layer 0 on.

    Args:
        x: (B, C), the residual stream, behind layer 0's own norm.
        states: of each block.
        parameters: of each block.

    Returns:
        x and the states after the token.
    """
    if not _fit(x, None, states, parameters):
        v_first, after = None, []
        for (att, wkv, ffn), p in zip(states, parameters, strict=True):
            x, v_first, *state = block_reference(x, v_first, att, wkv, ffn, p)
            after.append((state[0], state[1], state[2]))
        return x, after
    out, _, after = _run(x, None, states, parameters)
    return out, after


def block(
    x: Tensor, v_first: Tensor | None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor, p: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token of each sequence through one block.

    Args:
        x: (B, C), the residual stream.
        v_first: (B, C), the value of layer 0; None in layer 0.
        att_shift: see `State`.
        wkv: see `State`.
        ffn_shift: see `State`.
        p: the parameters.

    Returns:
        x, v_first, att_shift, wkv and ffn_shift after the token, shaped like those before.
    """
    states = [(att_shift, wkv, ffn_shift)]
    if not _fit(x, v_first, states, [p]):
        return block_reference(x, v_first, att_shift, wkv, ffn_shift, p)
    out, v_first, after = _run(x, v_first, states, [p])
    return out, v_first, *after[0]


def _fit(x: Tensor, v_first: Tensor | None, states: Sequence[State], parameters: Sequence[Parameters]) -> bool:
    """Whether the compiled form takes them."""
    given = [x, *(y for state in states for y in state)] if v_first is None else [x, v_first, *states[0]]
    wanted: Iterable[Tensor] = ()
    if torch.is_grad_enabled():
        wanted = (y for p in parameters for y in p.tensors.values())
    rows, channels = x.shape
    one = parameters[0]
    vectors, matrices = x.shape, (rows, one.heads, one.size, one.size)
    return (
        0 < rows <= ROWS
        and len(states) == len(parameters)
        and direct("block7", *given, one.tensors["att.r_k"], *wanted)
        and all(p.fits and p.channels == channels and p.heads == one.heads for p in parameters)
        and all(p.has_value_residual for p in parameters[v_first is None :])
        and (v_first is None or (v_first.shape == vectors and v_first.dtype is x.dtype))
        and all(
            att.shape == vectors and wkv.shape == matrices and ffn.shape == vectors
            and att.dtype is x.dtype and wkv.dtype is torch.float32 and ffn.dtype is x.dtype
            for att, wkv, ffn in states
        )
    )  # fmt: skip


def _run(
    x: Tensor, v_first: Tensor | None, states: Sequence[State], parameters: Sequence[Parameters]
) -> tuple[Tensor, Tensor, list[State]]:
    count, rows = len(states), len(x)
    x = x.contiguous()
    held = [y.contiguous() for state in states for y in state]
    shifts, matrices = x.new_empty((2, count, *x.shape)), held[1].new_empty((count, *held[1].shape))
    after = list(zip(shifts[0].unbind(), matrices.unbind(), shifts[1].unbind(), strict=True))
    layers = array("q")
    for i, (p, (att, wkv, ffn)) in enumerate(zip(parameters, after, strict=True)):
        before = held[3 * i : 3 * i + 3]
        layers.extend((
            before[0].data_ptr(), before[2].data_ptr(), before[1].data_ptr(),
            att.data_ptr(), ffn.data_ptr(), wkv.data_ptr(), p._record_at,
        ))  # fmt: skip
    out = torch.empty_like(x)
    given = None if v_first is None else v_first.contiguous()
    value = torch.empty_like(x) if v_first is None else v_first
    build.function("block7", "rwkv_block7", "9q")(
        x.data_ptr(), 0 if given is None else given.data_ptr(), out.data_ptr(), value.data_ptr() if given is None else 0,
        rows, x.dtype is torch.bfloat16, build.threads(), count, layers.buffer_info()[0],
    )  # fmt: skip
    return out, value, after


def block_reference(
    x: Tensor, v_first: Tensor | None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor, p: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same by the operators' references, with gradients."""
    t = p.tensors
    norms = [Norm(t[f"{name}.weight"], t[f"{name}.bias"], p.norm_eps) for name in ("ln1", "ln2")]
    (xr, xw, xk, xv, xa, xg), att = mix_reference(x[:, None], att_shift, [t[f"att.x_{m}"] for m in "rwkvag"], norms[0])
    r, k, v = (linear_reference(z, t[f"att.{n}.weight"]) for z, n in ((xr, "receptance"), (xk, "key"), (xv, "value")))
    w_raw = low_rank_reference(xw, t["att.w1"], t["att.w2"], t["att.w0"], "tanh")
    a_raw = low_rank_reference(xa, t["att.a1"], t["att.a2"], t["att.a0"])
    g = low_rank_reference(xg, t["att.g1"], t["att.g2"], None, "sigmoid")
    v_raw = None if v_first is None else low_rank_reference(xv, t["att.v1"], t["att.v2"], t["att.v0"])
    first = v[:, 0] if v_first is None else v_first
    k, v, a, b = prepare_reference(
        k, v, None if v_first is None else v_first[:, None], a_raw, v_raw, t["att.k_k"], t["att.k_a"], p.size
    )
    r, w_raw = r.view_as(k), w_raw.view_as(k)
    y, wkv = wkv7_reference(r, w_raw, k, v, a, b, wkv)
    norm = (t["att.ln_x.weight"], t["att.ln_x.bias"], t["att.r_k"], p.group_norm_eps)
    x = x + linear_reference(readout_reference(y, r, k, v, g, *norm), t["att.output.weight"])[:, 0]
    (z,), ffn = mix_reference(x[:, None], ffn_shift, [t["ffn.x_k"]], norms[1])
    hidden = torch.relu(linear_reference(z[:, 0], t["ffn.key.weight"])) ** 2
    return x + linear_reference(hidden, t["ffn.value.weight"]), first, att, wkv, ffn
