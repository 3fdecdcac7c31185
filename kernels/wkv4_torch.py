"""WKV-4 in chunks, by torch. The operator and its notation are in `kernels.wkv4`."""

import torch
from torch import Tensor

from kernels.wkv4 import NOTHING

CHUNK = 32
"""Steps done one after another, in all chunks at once."""

# Forwards the sums are x_{t+1} = e^l x_t + e^{k_t} (v_t, 1). Backwards, from the end, their gradients
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


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised."""
    return state.new_empty(steps // _length(steps) + 1, *state.shape)


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv4`. Kept are the states before each chunk, (chunks, B, 3, C)."""
    k_, v_ = _split(k, state.dtype), _split(v, state.dtype)
    values = torch.stack((v_, torch.ones_like(v_)), -2)
    log_decay = -torch.exp(w.to(state.dtype))
    p, x = _starts(log_decay, k_, values, state[:, 2], state[:, :2])
    starts = torch.cat((x, p.unsqueeze(-2)), -2)
    p, x = (sums[:-1] for sums in _steps(log_decay, k_, values, p, x))
    y, *_ = _average(k_, v_, u.to(state.dtype), p, x)
    last = k.shape[1] % len(k_)
    return _join(y, k), torch.cat((x[last, -1], p[last, -1].unsqueeze(-2)), -2), starts if keep else state.new_empty(0)


def backward(
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
