"""WKV-4, the recurrence of RWKV-4: an average of the values so far, each channel by itself.

         sum_{s<t} e^{(t-1-s) l + k_s} v_s + e^{u + k_t} v_t
    y_t = --------------------------------------------------        l = -exp(w)
         sum_{s<t} e^{(t-1-s) l + k_s}     + e^{u + k_t}

Shapes: B batch, T time, C channels, L chunk length.
Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.

The two sums, alpha and beta, leave the range of floats. They are held as e^p a and e^p b, p the largest exponent in them,
and every exponential below is of what lies p or more under it. The state is a, b and p. Only e^p a and e^p b have a
meaning; p is the choice of a unit, and gradients are taken at a fixed choice: that of p is zero.
"""

import torch
from torch import Tensor

from kernels.choice import Op, choose

CHUNK = 32
"""Steps done one after another, in all chunks at once."""

NOTHING = -1e38
"""The exponent of an empty sum."""


def wkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, *, op: Op = "auto") -> tuple[Tensor, Tensor]:
    """Run the recurrence over T steps.

    Args:
        k: (B, T, C) key.
        v: (B, T, C) value.
        w: (C,) the checkpoint's time_decay: the log decay of a step is -exp(w).
        u: (C,) the checkpoint's time_first, added to the key of the current step.
        state: (B, 3, C) float32 (or float64, to measure errors by): a, b and p before the first step. At the start of a
            text, a and b are 0 and p is `NOTHING`.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        y, (B, T, C) in the dtype of k, and the state after the last step, in the dtype of `state`. Both are
        differentiable in k, v, w, u and the state's a and b, with every p held constant.

    Raises:
        ValueError: the shapes disagree, T is 0, or `state` is neither float32 nor float64.
    """
    _check(k, v, w, u, state)
    with torch.autocast(state.device.type, enabled=False):  # as in the other recurrences: the state keeps its precision
        if choose(op, k, k.shape[1]) == "reference":
            return wkv4_reference(k, v, w, u, state)
        y, final, _ = _forward(k, v, w, u, state)
        return y, final


def wkv4_reference(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations above, step by step, in the dtype of `state`. Slow, differentiable, and the truth."""
    dtype = k.dtype
    k, v, w, u = (x.to(state.dtype) for x in (k, v, w, u))
    log_decay = -torch.exp(w)
    a, b, p = state.unbind(1)
    p = p.detach()
    ys = []
    for t in range(k.shape[1]):
        now = u + k[:, t]
        largest = torch.maximum(p, now).detach()
        before, here = torch.exp(p - largest), torch.exp(now - largest)
        ys.append((before * a + here * v[:, t]) / (before * b + here))
        decayed = log_decay + p
        p = torch.maximum(decayed, k[:, t]).detach()
        before, here = torch.exp(decayed - p), torch.exp(k[:, t] - p)
        a, b = before * a + here * v[:, t], before * b + here
    return torch.stack(ys, 1).to(dtype), torch.stack((a, b, p), 1)


def _check(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> None:
    if k.ndim != 3 or k.shape[1] == 0:
        raise ValueError(f"k is {tuple(k.shape)}; it must be (B, T, C) with T of 1 or more; reshape it")
    if v.shape != k.shape:
        raise ValueError(f"v is {tuple(v.shape)} but k is {tuple(k.shape)}; both are (B, T, C); reshape it")
    batch, _, channels = k.shape
    for name, x in (("w", w), ("u", u)):
        if x.shape != (channels,):
            raise ValueError(f"{name} is {tuple(x.shape)}; it must be {(channels,)}, one for all steps; flatten it")
    if state.shape != (batch, 3, channels):
        raise ValueError(f"state is {tuple(state.shape)}; it must be {(batch, 3, channels)}; expand it over the batch")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}; the recurrence loses too much below float32; pass state.float()")


# The chunked form. Forwards the sums are x_{t+1} = e^l x_t + e^{k_t} (v_t, 1). Backwards, from the end, their gradients
# are such a scan too, with other exponents and values. It is done in three short ones: over the steps of every chunk from
# nothing, all chunks at once, which gives what a chunk adds; over the chunks, which gives the sums before each; and over
# the steps again, from those. T is filled up by at least one step: the state before step T is the last.


def _steps(log_decay: Tensor, exponents: Tensor, values: Tensor, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The S + 1 sums before, between and after S steps, as e^p x.

    Args:
        log_decay: (C,) of one step.
        exponents: (S, ..., C) of what each step adds.
        values: (S, ..., 2, C) what it adds, but for that factor.
        p: (..., C) the first sums' exponent.
        x: (..., 2, C) the first sums, but for that factor.
    """
    ps = [p]
    for exponent in exponents:
        ps.append(torch.maximum(log_decay + ps[-1], exponent))
    p = torch.stack(ps)
    keep = torch.exp(log_decay + (p[:-1] - p[1:])).unsqueeze(-2)  # in this order it undoes the rounding of p
    add = torch.exp(exponents - p[1:]).unsqueeze(-2) * values
    xs = x.new_empty(len(p), *x.shape)
    xs[0] = x
    for n in range(len(add)):
        torch.addcmul(add[n], keep[n], xs[n], out=xs[n + 1])
    return p, xs


def _starts(log_decay: Tensor, exponents: Tensor, values: Tensor, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums before each chunk: (chunks, B, C) and (chunks, B, 2, C). Inputs as of `_steps`, in chunks."""
    nothing = torch.full_like(exponents[0], NOTHING), torch.zeros_like(values[0])
    added_p, added = _steps(log_decay, exponents, values, *nothing)
    return _steps(log_decay * len(exponents), added_p[-1, :-1], added[-1, :-1], p, x)


def _length(steps: int) -> int:
    return min(CHUNK, steps + 1)


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, C) -> (L, chunks, B, C)."""
    batch, steps, channels = x.shape
    length = _length(steps)
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, length - steps % length))
    return x.reshape(batch, -1, length, channels).permute(2, 1, 0, 3).contiguous()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """(L, chunks, B, C) -> the shape and dtype of `like`, (B, T, C)."""
    x = x.permute(2, 1, 0, 3).flatten(1, 2)[:, : like.shape[1]]
    return x.to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def _average(k: Tensor, v: Tensor, u: Tensor, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; the largest exponent, the weight of the current value and that of all, without that exponent's factor."""
    now = u + k
    largest = torch.maximum(p, now)
    here = torch.exp(now - largest)
    a, b = (x * torch.exp(p - largest).unsqueeze(-2)).unbind(-2)
    weight = b + here
    return (a + here * v) / weight, largest, here, weight


@torch.library.custom_op("rwkv::wkv4", mutates_args=())
def _forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the state before each chunk (chunks, B, 3, C), kept for the backward."""
    k_, v_ = _split(k, state.dtype), _split(v, state.dtype)
    values = torch.stack((v_, torch.ones_like(v_)), -2)
    log_decay = -torch.exp(w.to(state.dtype))
    p, x = _starts(log_decay, k_, values, state[:, 2], state[:, :2])
    starts = torch.cat((x, p.unsqueeze(-2)), -2)
    p, x = (sums[:-1] for sums in _steps(log_decay, k_, values, p, x))
    y, *_ = _average(k_, v_, u.to(state.dtype), p, x)
    last = k.shape[1] % len(k_)
    return _join(y, k), torch.cat((x[last, -1], p[last, -1].unsqueeze(-2)), -2), starts


@_forward.register_fake
def _(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    starts = state.new_empty(k.shape[1] // _length(k.shape[1]) + 1, *state.shape)
    return k.new_empty(k.shape), torch.empty_like(state, memory_format=torch.contiguous_format), starts


@torch.library.custom_op("rwkv::wkv4_backward", mutates_args=())
def _backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, starts: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the first state. All sums are made again from the state before each chunk."""
    dtype = starts.dtype
    k_, v_, dy_ = _split(k, dtype), _split(v, dtype), _split(dy, dtype)
    values = torch.stack((v_, torch.ones_like(v_)), -2)
    log_decay = -torch.exp(w.to(dtype))
    p, x = (sums[:-1] for sums in _steps(log_decay, k_, values, starts[:, :, 2], starts[:, :, :2]))
    y, largest, here, weight = _average(k_, v_, u.to(dtype), p, x)

    # The gradients of the sums, as e^q g. The last state's enter as what step T adds; the steps after it add 0.
    g = dy_ / weight
    exponents, entering = -largest, torch.stack((g, -g * y), -2)
    last = k.shape[1] % len(k_)
    exponents[last, -1], entering[last, -1] = -p[last, -1], dfinal[:, :2]
    exponents, entering = exponents.flip(0, 1), entering.flip(0, 1)
    nothing = torch.full_like(p[0, 0], NOTHING), torch.zeros_like(x[0, 0])
    q, dx = _steps(log_decay, exponents, entering, *_starts(log_decay, exponents, entering, *nothing))
    dstart = torch.exp(q[-1, -1] + starts[0, :, 2]).unsqueeze(-2) * dx[-1, -1]
    q, dx = q[:-1].flip(0, 1), dx[:-1].flip(0, 1)

    through_state = torch.exp(k_ + q)
    through_y = g * here
    du = through_y * (v_ - y)
    dk = (dx * values).sum(-2) * through_state + du
    dv = dx[..., 0, :] * through_state + through_y
    dlog_decay = torch.exp(log_decay + p + q) * (dx * x).sum(-2)
    dw = dlog_decay.sum((0, 1, 2)) * log_decay
    dstate = torch.cat((dstart, torch.zeros_like(dstart[:, :1])), 1)
    return _join(dk, k), _join(dv, v), dw.to(w.dtype), du.sum((0, 1, 2)).to(u.dtype), dstate


@_backward.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, starts: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dk, dv, dw, du = (x.new_empty(x.shape) for x in (k, v, w, u))
    return dk, dv, dw, du, starts.new_empty(dfinal.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], output[2])


def _grad(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dfinal: Tensor, _dstarts: Tensor) -> tuple[Tensor, ...]:
    *inputs, starts = ctx.saved_tensors  # type: ignore[attr-defined]
    with torch.autocast(dfinal.device.type, enabled=False):
        grads: tuple[Tensor, ...] = _backward(*inputs, starts, dy, dfinal)
    return grads


_forward.register_autograd(_grad, setup_context=_save)
