"""Token shift: each token and the one before, mixed once for each of the matrices that follow.

    z_i,t = n_t + (n_{t-1} - n_t) mu_i        n_t = norm(x_t), or x_t where there is no norm

Backward, g_i the gradient of z_i, which is nowhere kept:

    dn_t = sum_i g_i,t (1 - mu_i) + sum_i g_i,t+1 mu_i        dmu_i = sum_t g_i,t (n_{t-1} - n_t)

Shapes: B batch, T time, C channels. Source: Peng et al. 2025, arXiv:2503.14456.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import build
from kernels.choice import CPU_DTYPES, Form, Op, choose, direct
from kernels.operator import operator

FORMS: tuple[Form, ...] = ("cpu", "triton", "torch")
"""The forms, fastest first. All compute in float32."""

MOST = 6
"""Mixes at once."""


class Norm(NamedTuple):
    """A layer norm over channels."""

    weight: Tensor
    """(C,)"""
    bias: Tensor
    """(C,)"""
    eps: float


def mix(
    x: Tensor, last: Tensor, mus: Sequence[Tensor], norm: Norm | None = None, *, op: Op = "auto"
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Mix each token with the one before it.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first, already normed.
        mus: the shares of the token before, (C,) or (1, 1, C) each; 1 to 6.
        norm: the layer norm that x goes through first; None is none.
        op: the implementation, see `kernels.choice`; "torch" and "reference" are torch.

    Returns:
        A (B, T, C) for each of `mus`, and the last token (B, C) as it was mixed, the `last` of what follows: all in the dtype
        of x, but under autocast each of the first may be in its dtype; and differentiable in x, `last`, `mus` and the norm's
        weight and bias.

    Raises:
        ValueError: the shapes disagree, or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    parameters = (*mus, *norm[:2]) if norm else tuple(mus)
    first = parameters[0]
    _check(x, last, parameters, len(mus))
    if (
        op not in ("auto", "cpu")
        or not direct("token_shift", x, last, *parameters)
        or last.dtype is not x.dtype
        or any([p.dtype is not first.dtype for p in parameters])
    ):
        return apply(choose("token_shift", op, FORMS, x), x, last, mus, norm)
    x, last = x.contiguous(), last.contiguous()
    z, final = [torch.empty_like(x) for _ in mus], torch.empty_like(last)
    kept = [p.contiguous() for p in parameters]  # as long as their memory is read
    addresses = [p.data_ptr() for p in kept]
    _forward_cpu(
        x, last, [y.data_ptr() for y in z], addresses[: len(mus)], addresses[len(mus) :] or (0, 0),
        norm.eps if norm else 0.0, (x.dtype, first.dtype), final, 0,
    )  # fmt: skip
    return tuple(z), final


def mix_reference(
    x: Tensor, last: Tensor, mus: Sequence[Tensor], norm: Norm | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same by torch."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *norm)
    change = torch.cat((last[:, None], x[:, :-1]), 1) - x
    return tuple(torch.addcmul(x, change, mu) for mu in mus), x[:, -1]


def _check(x: Tensor, last: Tensor, parameters: Sequence[Tensor], mixes: int) -> None:
    batch, steps, channels = x.shape if x.ndim == 3 else (0, 0, 0)
    if not steps:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (B, T, C) with T of 1 or more; reshape it")
    if (
        not 1 <= mixes <= MOST
        or last.shape != (batch, channels)
        or any([p.numel() != channels for p in parameters])  # of a list: this is half the time of a generator
    ):
        raise ValueError(
            f"last is {tuple(last.shape)} and the parameters {[tuple(p.shape) for p in parameters]} for x {tuple(x.shape)}; "
            f"they must be {(batch, channels)} and {channels} values each, and at most {MOST} mixes"
        )


def apply(
    form: Form, x: Tensor, last: Tensor, mus: Sequence[Tensor], norm: Norm | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The operator by the form of that name, which must be able to work on these: `mix` has chosen and checked."""
    if form in ("torch", "reference"):
        return mix_reference(x, last, mus, norm)
    parameters = (*mus, *norm[:2]) if norm else tuple(mus)
    dtype = parameters[0].dtype if all(p.dtype == parameters[0].dtype for p in parameters) else torch.float32
    shares = torch.stack([mu.reshape(-1) for mu in mus]).to(dtype)
    weight, bias = (p.reshape(-1).to(dtype) for p in norm[:2]) if norm else (None, None)
    keep = torch.is_grad_enabled() and any(y.requires_grad for y in (x, last, *parameters))
    *z, final, _ = _forward(
        x, last.to(x.dtype), shares, weight, bias, norm.eps if norm else 0.0, _mixed_dtype(x), form, keep
    )
    return tuple(z[: len(mus)]), final


def _mixed_dtype(x: Tensor) -> torch.dtype:
    """That of x; under autocast, that to which the matrices would round the mixes anyway, in passes of their own."""
    device = x.device.type
    if x.dtype is not torch.float32 or not torch.is_autocast_enabled(device):
        return x.dtype
    dtype = torch.get_autocast_dtype(device)
    return x.dtype if x.is_cpu and dtype not in CPU_DTYPES else dtype


_Mixed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("rwkv::mix")
def _forward(
    x: Tensor,
    last: Tensor,
    mus: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    form: str,
    keep: bool,
) -> _Mixed:
    """The mixes, empty ones to make them 6, the last token, and if `keep`, mean and 1 / deviation of each token, (B, T, 2).

    mus is (mixes, C), dtype that of the mixes. These are no list: autograd takes 0.1 ms to take one apart and to put it
    together.
    """
    x, last, mus = x.contiguous(), last.contiguous(), mus.contiguous()
    if weight is not None and bias is not None:
        weight, bias = weight.contiguous(), bias.contiguous()
    empty = _empty(x, last, mus, weight, dtype, keep)
    z, final, statistics = empty[: mus.shape[0]], *empty[MOST:]
    if form == "triton":
        from kernels import token_shift_triton

        token_shift_triton.forward(x, last, mus, weight, bias, eps, z, final, statistics)
    else:
        _forward_cpu(
            x, last, [y.data_ptr() for y in z], _addresses(mus), (_address(weight), _address(bias)), eps,
            (dtype, mus.dtype), final, _address(statistics),
        )  # fmt: skip
    return empty


@_forward.register_fake
def _(
    x: Tensor,
    last: Tensor,
    mus: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    form: str,
    keep: bool,
) -> _Mixed:
    return _empty(x, last, mus, weight, dtype, keep)


def _empty(x: Tensor, last: Tensor, mus: Tensor, weight: Tensor | None, dtype: torch.dtype, keep: bool) -> _Mixed:
    a, b, c, d, e, f = (x.new_empty(x.shape if m < mus.shape[0] else (0,), dtype=dtype) for m in range(MOST))
    size = (*x.shape[:2], 2) if keep and weight is not None else (0,)
    return a, b, c, d, e, f, last.new_empty(last.shape), x.new_empty(size, dtype=torch.float32)


@operator("rwkv::mix_backward")
def _backward(
    dz: list[Tensor],
    dfinal: Tensor,
    x: Tensor,
    last: Tensor,
    mus: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    form: str,
    of_mus: bool,
    of_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, `last`, and where they are asked for of mus, and of weight and bias: else these are empty."""
    dz, dfinal = [g.contiguous() for g in dz], dfinal.contiguous()
    x, last, mus = x.contiguous(), last.contiguous(), mus.contiguous()
    if weight is not None and bias is not None:
        weight, bias = weight.contiguous(), bias.contiguous()
    dx, dlast, *of_parameters = _gradients(x, last, mus, weight, of_mus, of_norm, torch.float32)
    if form == "triton":
        from kernels import token_shift_triton

        token_shift_triton.backward(dz, dfinal, x, last, mus, weight, bias, statistics, dx, dlast, *of_parameters)
    else:
        unused = _UNUSED[len(dz)]
        build.function("token_shift", "rwkv_mix_backward", "31q")(
            *(g.data_ptr() for g in dz), *unused, dfinal.data_ptr(), x.data_ptr(), last.data_ptr(), _address(statistics),
            *_addresses(mus), *unused, _address(weight), _address(bias),
            *(_address(y) for y in (dx, dlast, *of_parameters)),
            len(dz), *x.shape, *[y.dtype is torch.bfloat16 for y in (x, dz[0], mus)], build.threads(),
        )  # fmt: skip
    dmus, dweight, dbias = (g.to(mus.dtype) for g in of_parameters)
    return dx, dlast, dmus, dweight, dbias


@_backward.register_fake
def _(
    dz: list[Tensor],
    dfinal: Tensor,
    x: Tensor,
    last: Tensor,
    mus: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    form: str,
    of_mus: bool,
    of_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, last, mus, weight, of_mus, of_norm, mus.dtype)


def _gradients(
    x: Tensor, last: Tensor, mus: Tensor, weight: Tensor | None, of_mus: bool, of_norm: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dmus = x.new_empty(mus.shape if of_mus else (0,), dtype=dtype)
    dweight, dbias = (x.new_empty(x.shape[-1] if of_norm and weight is not None else 0, dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), last.new_empty(last.shape), dmus, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _eps, _dtype, ctx.form, _keep = inputs
    ctx.mixes = tensors[2].shape[0]
    ctx.save_for_backward(*tensors, output[-1])


def _grad(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dz, dfinal = list(grads[: ctx.mixes]), grads[MOST]
    of_mus, of_norm = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:5])
    dx, dlast, dmus, dweight, dbias = _backward(dz, dfinal, *ctx.saved_tensors, ctx.form, of_mus, of_norm)
    of_parameters = dmus if of_mus else None, *((dweight, dbias) if of_norm else (None, None))
    return dx, dlast, *of_parameters, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


def _forward_cpu(
    x: Tensor, last: Tensor, z: Sequence[int], mus: Sequence[int], norm: Sequence[int], eps: float,
    dtypes: Sequence[torch.dtype], final: Tensor, statistics: int,
) -> None:  # fmt: skip
    """Call the C++ with addresses; the dtypes are those of z and of the parameters."""
    unused = _UNUSED[len(z)]
    build.function("token_shift", "rwkv_mix", "18qd8q")(
        x.data_ptr(), last.data_ptr(), *z, *unused, final.data_ptr(), statistics, *mus, *unused, *norm, eps,
        len(z), *x.shape, x.dtype is torch.bfloat16, *[dtype is torch.bfloat16 for dtype in dtypes], build.threads(),
    )  # fmt: skip


_UNUSED = [(0,) * (MOST - mixes) for mixes in range(MOST + 1)]


def _addresses(rows: Tensor) -> Sequence[int]:
    """Of the rows of a contiguous tensor."""
    step = rows.stride(0) * rows.itemsize
    return range(rows.data_ptr(), rows.data_ptr() + len(rows) * step, step)


def _address(x: Tensor | None) -> int:
    """0 of none, and of an empty one."""
    return x.data_ptr() if x is not None and x.numel() else 0
