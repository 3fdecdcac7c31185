"""WKV-7, the recurrence of RWKV-7.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t' + v_t k_t'        d_t = exp(-exp(-1/2) sigmoid(w_raw_t))
    y_t = S_t r_t

Shapes: B batch, T time, H heads, N head size, L chunk length. S is (B, H, N, N): rows are values, columns are keys.
Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. The chunked form is
the WY representation of the products of I - kappa kappa', as for DeltaNet: Yang et al. 2024, arXiv:2406.06484.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import build
from kernels.choice import CPU_DTYPES, Op, choose, direct

LOG_DECAY_MIN = -math.exp(-0.5)
"""Strongest log decay of one step: w_raw = +infinity."""

CHUNK = 16
"""Steps that become matrix products together. Within a chunk the decays span at most e^(0.61 * 16 / 2) each way from
the middle. Of 16, 32 and 64, 16 is the most accurate (its error is that of the step-by-step form) and no slower on a CPU."""


def wkv7(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, *, op: Op = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T steps.

    Args:
        r: (B, T, H, N) receptance.
        w_raw: (B, T, H, N) decay before squashing, any real: the decay is exp(-exp(-1/2) sigmoid(w_raw)).
        k: (B, T, H, N) key.
        v: (B, T, H, N) value.
        a: (B, T, H, N) direction to remove; RWKV-7 passes -kappa, |kappa| = 1.
        b: (B, T, H, N) direction to write back; RWKV-7 passes kappa * in-context learning rate.
        state: (B, H, N, N) float32 (or float64, to measure errors by), S before the first step.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        y, (B, T, H, N) in the dtype of r, and S after the last step, in the dtype of `state`. Both are differentiable
        in all seven inputs.

    Raises:
        ValueError: the shapes disagree, T is 0, `state` is neither float32 nor float64, or `op` can't work on these.
        RuntimeError: `op` is "cpu" and it could not be compiled.
    """
    _check(r, w_raw, k, v, a, b, state)
    inputs = (r, w_raw, k, v, a, b, state)
    chosen = choose(op, r if state.dtype == torch.float32 else state, r.shape[1], compiled=True)
    if chosen == "cpu":
        if direct(*inputs):
            y, final, _ = _run_cpu_forward(*inputs, keep=False)
        else:
            keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
            y, final, _ = _cpu_forward(*inputs, keep)
        return y, final
    with torch.autocast(state.device.type, enabled=False):  # it would turn the products below to bfloat16
        if chosen == "reference":
            return wkv7_reference(*inputs)
        y, final, _ = _forward(*inputs)
        return y, final


def wkv7_reference(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations above, step by step, in the dtype of `state`. Slow, differentiable, and the truth."""
    dtype = r.dtype
    r, w_raw, k, v, a, b = (x.to(state.dtype) for x in (r, w_raw, k, v, a, b))
    decay = torch.exp(LOG_DECAY_MIN * torch.sigmoid(w_raw))
    ys = []
    for t in range(r.shape[1]):
        removed = state @ a[:, t, :, :, None]  # (B, H, N, 1)
        state = state * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None]
        ys.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(ys, 1).to(dtype), state


def _check(r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> None:
    if r.ndim != 4 or r.shape[1] == 0:
        raise ValueError(f"r is {tuple(r.shape)}; it must be (B, T, H, N) with T of 1 or more; reshape it")
    for name, x in (("w_raw", w_raw), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x.shape != r.shape:
            raise ValueError(
                f"{name} is {tuple(x.shape)} but r is {tuple(r.shape)}; all six share (B, T, H, N); reshape it"
            )
    batch, _, heads, size = r.shape
    if state.shape != (batch, heads, size, size):
        raise ValueError(
            f"state is {tuple(state.shape)}; it must be {(batch, heads, size, size)}; expand it over the batch"
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}; the recurrence loses too much below float32; pass state.float()")


# The chunked form. Everything inside a chunk is matrix products over all chunks at once; only the state passes from
# chunk to chunk, as S' = S (diag(e^{c_L}) + P) + Q. Rows t = 1..L of a chunk; c_t is the sum of log decays up to and with
# t, ce_t without t. Factors are scaled around the middle row m, so that none leaves the range of float32.


class _Chunks(NamedTuple):
    """What both directions need of every chunk. (C, L, N) unless said otherwise, C = chunks * B * H."""

    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    sigmoid: Tensor
    """sigmoid(w_raw)"""
    later: Tensor
    """e^{c - m}: what r is scaled by"""
    later_a: Tensor
    """e^{ce - m}: what a is scaled by"""
    earlier: Tensor
    """e^{m - c}: what k and b are scaled by"""
    from_start: Tensor
    """e^m, (C, 1, N): turns a scale from the middle into one from the chunk's start"""
    to_end: Tensor
    """e^{c_L - m}, (C, 1, N): turns it into one to the chunk's end"""
    ab: Tensor
    """(C, L, L), strictly lower: a_t . b_s under the decays between, as are ak; rb and rk include s = t"""
    ak: Tensor
    rb: Tensor
    rk: Tensor
    inverse: Tensor
    """(I - ab)^{-1}, (C, L, L)"""


def _split(x: Tensor, length: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) -> (chunks, B * H, L, N), T filled up with steps that change nothing."""
    batch, steps, heads, size = x.shape
    missing = -steps % length
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, missing), value=fill)
    return x.view(batch, -1, length, heads, size).permute(1, 0, 3, 2, 4).reshape(-1, batch * heads, length, size)


def _join(x: Tensor, like: Tensor) -> Tensor:
    """(chunks, B * H, L, N) -> the shape and dtype of `like`, (B, T, H, N)."""
    batch, steps, heads, size = like.shape
    chunks, _, length, _ = x.shape
    x = x.view(chunks, batch, heads, length, size).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, size)
    return x[:, :steps].to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def _length(steps: int) -> int:
    return min(CHUNK, 1 << (steps - 1).bit_length())


def _chunks(r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> _Chunks:
    length = _length(r.shape[1])
    r, k, v, a, b = (_split(x, length, dtype) for x in (r, k, v, a, b))
    sigmoid = torch.sigmoid(_split(w_raw, length, dtype, fill=-torch.inf))  # decay 1 in the steps filled in
    log_decay = LOG_DECAY_MIN * sigmoid
    with_t = log_decay.cumsum(-2)
    middle = with_t[..., max(length // 2 - 1, 0), None, :]
    later = torch.exp(with_t - middle)
    later_a = torch.exp(with_t - log_decay - middle)
    earlier = torch.exp(middle - with_t)
    products = torch.cat((a * later_a, r * later), -2) @ torch.cat((b * earlier, k * earlier), -2).mT
    before = torch.ones(length, length, dtype=torch.bool, device=r.device).tril(-1)
    until = torch.ones_like(before).tril()
    ab, ak, rb, rk = (
        products[..., rows, columns].masked_fill(~mask, 0)
        for rows, mask in ((slice(length), before), (slice(length, None), until))
        for columns in (slice(length), slice(length, None))
    )
    return _Chunks(
        r, k, v, a, b, sigmoid, later, later_a, earlier,
        from_start=torch.exp(middle), to_end=torch.exp(with_t[..., -1:, :] - middle),
        ab=ab, ak=ak, rb=rb, rk=rk, inverse=_inverse(ab),
    )  # fmt: skip


def _inverse(x: Tensor) -> Tensor:
    """(I - x)^{-1} of a strictly lower triangular x, (..., L, L): the product of I + x^(2^i), exact since x^L = 0."""
    length = x.shape[-1]
    inverse = torch.eye(length, dtype=x.dtype, device=x.device) + x
    power, reached = x, 2
    while reached < length:
        power = power @ power
        inverse = inverse + inverse @ power
        reached *= 2
    return inverse


def _removal(c: _Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """The rows u_t = S_{t-1} a_t as u = own + by_state S', and the map P that they add to the state's passage."""
    own = c.inverse @ (c.ak @ c.v)  # (C, L, N) value
    by_state = c.inverse @ (c.a * c.later_a * c.from_start)  # (C, L, N) key
    passage = by_state.mT @ (c.b * c.earlier * c.to_end)  # (C, N, N) key by key, added to diag(e^{c_L})
    return own, by_state, passage + torch.diag_embed((c.from_start * c.to_end).squeeze(-2))


@torch.library.custom_op("rwkv::wkv7", mutates_args=())
def _forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the state before each chunk (chunks, B * H, N, N), kept for the backward."""
    c = _chunks(r, w_raw, k, v, a, b, state.dtype)
    own, by_state, passage = _removal(c)
    written = c.v.mT @ (c.k * c.earlier * c.to_end) + own.mT @ (c.b * c.earlier * c.to_end)
    chunks, rows, _, size = c.r.shape
    states = state.new_empty(chunks + 1, rows, size, size)
    states[0] = state.reshape(rows, size, size)
    for n in range(chunks):
        torch.baddbmm(written[n], states[n], passage[n], out=states[n + 1])
    before = states[:-1]
    y = c.rk @ c.v + c.rb @ (own + by_state @ before.mT) + (c.r * c.later * c.from_start) @ before.mT
    return _join(y, r), states[-1].view_as(state).clone(), before.clone()


@_forward.register_fake
def _(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, heads, size = r.shape
    length = _length(steps)
    before = state.new_empty(-(-steps // length), batch * heads, size, size)
    return r.new_empty(r.shape), torch.empty_like(state, memory_format=torch.contiguous_format), before


@torch.library.custom_op("rwkv::wkv7_backward", mutates_args=())
def _backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w_raw, k, v, a, b and the first state. The chunks' matrices are made again, not kept."""
    c = _chunks(r, w_raw, k, v, a, b, before.dtype)
    own, by_state, passage = _removal(c)
    chunks, rows, length, size = c.r.shape
    dy_ = _split(dy, length, before.dtype)
    u = own + by_state @ before.mT

    # The gradient of the state passes backwards as D = D' passage' + E.
    entering = dy_.mT @ (c.r * c.later * c.from_start + c.rb @ by_state)
    grads = before.new_empty(chunks + 1, rows, size, size)
    grads[chunks] = dfinal.reshape(rows, size, size)
    for n in reversed(range(chunks)):
        torch.baddbmm(entering[n], grads[n + 1], passage[n].mT, out=grads[n])
    after = grads[1:]

    k_end, b_end = c.k * c.earlier * c.to_end, c.b * c.earlier * c.to_end
    dz = c.inverse.mT @ (c.rb.mT @ dy_ + b_end @ after.mT)  # gradient of the right-hand side that u solves
    dv = c.rk.mT @ dy_ + k_end @ after.mT + c.ak.mT @ dz
    products = torch.cat((dz, dy_), -2) @ torch.cat((u, c.v), -2).mT
    dab, dak = products[..., :length, :length].tril(-1), products[..., :length, length:].tril(-1)
    drb, drk = products[..., length:, :length].tril(), products[..., length:, length:].tril()
    k_, b_, r_, a_ = c.k * c.earlier, c.b * c.earlier, c.r * c.later, c.a * c.later_a
    dr = c.later * (drk @ k_ + drb @ b_ + (dy_ @ before) * c.from_start)
    da = c.later_a * (dak @ k_ + dab @ b_ + (dz @ before) * c.from_start)
    dk = c.earlier * (drk.mT @ r_ + dak.mT @ a_ + (c.v @ after) * c.to_end)
    db = c.earlier * (drb.mT @ r_ + dab.mT @ a_ + (u @ after) * c.to_end)

    # The decay's gradient follows from the others: a sum over the rows behind, anchored at the chunk's end.
    ends = before * (c.from_start * c.to_end) + c.v.mT @ k_end + u.mT @ b_end
    anchor = (after * ends).sum(-2, keepdim=True)
    at_t, at_previous = c.r * dr - c.k * dk - c.b * db, c.a * da
    dlog_decay = anchor + (at_t + at_previous).flip(-2).cumsum(-2).flip(-2) - at_previous
    # sigmoid(-w) rather than 1 - sigmoid(w), which has no correct digit left at w = 17
    dw_raw = dlog_decay * LOG_DECAY_MIN * c.sigmoid * torch.sigmoid(-_split(w_raw, length, before.dtype))
    grads_of = zip((dr, dw_raw, dk, dv, da, db), (r, w_raw, k, v, a, b), strict=True)
    dr, dw_raw, dk, dv, da, db = (_join(grad, x) for grad, x in grads_of)
    return dr, dw_raw, dk, dv, da, db, grads[0].clone().view_as(dfinal)


@_backward.register_fake
def _fake_gradients(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    same = [x.new_empty(x.shape) for x in (r, w_raw, k, v, a, b)]
    return same[0], same[1], same[2], same[3], same[4], same[5], before.new_empty(dfinal.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], output[2])


def _grad(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dfinal: Tensor, _dbefore: Tensor) -> tuple[Tensor, ...]:
    *inputs, before = ctx.saved_tensors  # type: ignore[attr-defined]
    with torch.autocast(dfinal.device.type, enabled=False):
        grads: tuple[Tensor, ...] = _backward(*inputs, before, dy, dfinal)
    return grads


_forward.register_autograd(_grad, setup_context=_save)


# The compiled form, csrc/wkv7.cpp: step by step in float32, whatever the inputs' dtypes.


def _readable(x: Tensor) -> Tensor:
    return (x if x.dtype in CPU_DTYPES else x.float()).contiguous()


def _run_cpu_forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, heads, size = r.shape
    inputs = [_readable(x) for x in (r, w_raw, k, v, a, b)]
    state = state.contiguous()
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    before = state.new_empty((batch * heads, -(-steps // CHUNK) if keep else 0, size, size))
    build.function("rwkv_wkv7_forward", "16q")(
        *(x.data_ptr() for x in inputs), state.data_ptr(), y.data_ptr(), final.data_ptr(), before.data_ptr(),
        batch, steps, heads, size, _bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    return y, final, before


def _bf16_bits(xs: list[Tensor]) -> int:
    return sum((x.dtype == torch.bfloat16) << i for i, x in enumerate(xs))


@torch.library.custom_op("rwkv::wkv7_cpu", mutates_args=())
def _cpu_forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and if `keep` the state before each chunk (B * H, chunks, N, N), key by value, for the backward."""
    return _run_cpu_forward(r, w_raw, k, v, a, b, state, keep)


@_cpu_forward.register_fake
def _(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, heads, size = r.shape
    before = state.new_empty((batch * heads, -(-steps // CHUNK) if keep else 0, size, size))
    return r.new_empty(r.shape), torch.empty_like(state, memory_format=torch.contiguous_format), before


@torch.library.custom_op("rwkv::wkv7_cpu_backward", mutates_args=())
def _cpu_backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w_raw, k, v, a, b and the first state. The states within a chunk are made again, not kept."""
    batch, steps, heads, size = r.shape
    inputs = [_readable(x) for x in (r, w_raw, k, v, a, b)]
    dy, dfinal = dy.to(inputs[0].dtype).contiguous(), dfinal.contiguous()
    grads = [torch.empty_like(x) for x in (*inputs, dfinal)]
    build.function("rwkv_wkv7_backward", "22q")(
        *(x.data_ptr() for x in (*inputs, before, dy, dfinal, *grads)),
        batch, steps, heads, size, _bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    dr, dw_raw, dk, dv, da, db = (grad.to(x.dtype) for grad, x in zip(grads, (r, w_raw, k, v, a, b), strict=False))
    return dr, dw_raw, dk, dv, da, db, grads[6]


_cpu_backward.register_fake(_fake_gradients)


def _cpu_grad(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dfinal: Tensor, _dbefore: Tensor
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor, ...] = _cpu_backward(*ctx.saved_tensors, dy, dfinal)  # type: ignore[attr-defined]
    return *grads, None


_cpu_forward.register_autograd(_cpu_grad, setup_context=_save)
