"""WKV-6, the recurrence of RWKV-6, and that of RWKV-5, whose decay is the same in every step.

    y_t = S_{t-1} r_t + (sum_j r_tj u_j k_tj) v_t        d_t = exp(-exp(w_raw_t))
    S_t = S_{t-1} diag(d_t) + v_t k_t'

Shapes: B batch, T time, H heads, N head size, L chunk length. S is (B, H, N, N): rows are values, columns are keys.
Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.choice import Op, choose

CHUNK = 16
"""Steps that become matrix products together: a power of two. Every length is as accurate as the step-by-step form."""


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, *, op: Op = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T steps.

    Args:
        r: (B, T, H, N) receptance.
        k: (B, T, H, N) key.
        v: (B, T, H, N) value.
        w_raw: (B, T, H, N) decay before squashing: the decay is exp(-exp(w_raw)), anything from 1 to 0. RWKV-5 passes its
            (H, N) expanded. Below 88: where exp(w_raw) is infinite, its gradient is NaN.
        u: (H, N) bonus of the current step.
        state: (B, H, N, N) float32 (or float64, to measure errors by), S before the first step.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        y, (B, T, H, N) in the dtype of r, and S after the last step, in the dtype of `state`. Both are differentiable
        in all six inputs.

    Raises:
        ValueError: the shapes disagree, T is 0, or `state` is neither float32 nor float64.
    """
    _check(r, k, v, w_raw, u, state)
    with torch.autocast(state.device.type, enabled=False):  # it would turn the products below to bfloat16
        if choose(op, r, r.shape[1]) == "reference":
            return wkv6_reference(r, k, v, w_raw, u, state)
        y, final, _ = _forward(r, k, v, w_raw, u, state)
        return y, final


def wkv6_reference(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations above, step by step, in the dtype of `state`. Slow, differentiable, and the truth."""
    dtype = r.dtype
    r, k, v, w_raw, u = (x.to(state.dtype) for x in (r, k, v, w_raw, u))
    decay = torch.exp(-torch.exp(w_raw))
    bonus = (r * u * k).sum(-1, keepdim=True) * v
    ys = []
    for t in range(r.shape[1]):
        ys.append((state @ r[:, t, :, :, None]).squeeze(-1) + bonus[:, t])
        state = state * decay[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(ys, 1).to(dtype), state


def _check(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> None:
    if r.ndim != 4 or r.shape[1] == 0:
        raise ValueError(f"r is {tuple(r.shape)}; it must be (B, T, H, N) with T of 1 or more; reshape it")
    for name, x in (("k", k), ("v", v), ("w_raw", w_raw)):
        if x.shape != r.shape:
            raise ValueError(
                f"{name} is {tuple(x.shape)} but r is {tuple(r.shape)}; all four share (B, T, H, N); reshape or expand it"
            )
    batch, _, heads, size = r.shape
    if u.shape != (heads, size):
        raise ValueError(f"u is {tuple(u.shape)}; it must be {(heads, size)}, one for all steps; reshape it")
    if state.shape != (batch, heads, size, size):
        raise ValueError(
            f"state is {tuple(state.shape)}; it must be {(batch, heads, size, size)}; expand it over the batch"
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}; the recurrence loses too much below float32; pass state.float()")


# The chunked form. From chunk to chunk the state passes as S' = S diag(D) + V' K, D the product of the chunk's decays.
# Within a chunk, y = A V with scores A_ts = sum_j r_tj k_sj (product of the decays after s and before t)_j for s < t, and
# the bonus on the diagonal.
#
# A decay may be 0, so that no quotient of products stands for the product in between, nor a difference of sums for the
# sum: next to a log decay of -1000 that of -0.001 is lost. So each pair s < t is cut where it is first parted as the
# chunk is halved again and again: with blocks of 1, 2, 4, ... steps, s is in a block and t in the next, and the decays
# between are those from s to the end of its block times those from the start of t's block. Both are plain products of
# decays, at most 1, and the scores of all pairs parted there are one matrix product.


class _Level(NamedTuple):
    """A chunk cut into blocks of equal length. (C, L, N), C = chunks * B * H, but for the masks, (L, L), a row per t."""

    start: Tensor
    """product of the decays from the start of t's block until before t"""
    end: Tensor
    """product of the decays after s until the end of its block"""
    read: Tensor
    """r * start"""
    write: Tensor
    """k * end"""
    pairs: Tensor
    """s is in the first block of two, t in the second"""
    behind: Tensor
    """s is in the block of t, after it"""


def _levels(r: Tensor, k: Tensor, decay: Tensor) -> Iterator[_Level]:
    """Blocks of 1, 2, 4, ... steps, at last the whole chunk, which has no pairs. Each level overwrites the one before."""
    step = torch.arange(r.shape[-2], device=r.device)
    start, end, whole = torch.ones_like(decay), torch.ones_like(decay), decay
    read, write = r.clone(), k.clone()
    size = 1
    while True:
        block = (step // size)[:, None]
        pairs = (block % 2 == 1) & (block.mT == block - 1)
        yield _Level(start, end, read, write, pairs, (block.mT == block) & (step > step[:, None]))
        if size == len(step):
            return
        first, second = whole[:, 0::2, None], whole[:, 1::2, None]
        halves = (len(r), -1, 2, size, r.shape[-1])
        _shrink(start.view(halves)[:, :, 1], first)
        _shrink(end.view(halves)[:, :, 0], second)
        whole = (first * second).squeeze(2)
        torch.mul(r, start, out=read)
        torch.mul(k, end, out=write)
        size *= 2


def _shrink(x: Tensor, factor: Tensor) -> None:
    """Multiply x by `factor` in place, to 0 where it becomes too small for the product of two such to be a normal number.

    CPUs are slow at others: without this, the forward took five times as long where the decays were strong.
    """
    torch.threshold_(x.mul_(factor), torch.finfo(x.dtype).tiny ** 0.5, 0.0)


def _length(steps: int) -> int:
    return min(CHUNK, 1 << (steps - 1).bit_length())


def _split(x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) -> (chunks * B * H, L, N), T filled up with steps that change nothing."""
    batch, steps, heads, size = x.shape
    length = _length(steps)
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, -steps % length), value=fill)
    return x.reshape(batch, -1, length, heads, size).permute(1, 0, 3, 2, 4).reshape(-1, length, size)


def _join(x: Tensor, like: Tensor) -> Tensor:
    """(chunks * B * H, L, N) -> the shape and dtype of `like`, (B, T, H, N)."""
    batch, steps, heads, size = like.shape
    x = x.view(-1, batch, heads, x.shape[1], size).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :steps]
    return x.to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def _split_all(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In chunks: r, k, v, minus the log decay, and u as (C, 1, N)."""
    r, k, v = (_split(x, dtype) for x in (r, k, v))
    rate = torch.exp(_split(w_raw, dtype, fill=-torch.inf))  # decay 1 in the steps filled in
    return r, k, v, rate, u.to(dtype).repeat(len(r) // len(u), 1)[:, None]


@torch.library.custom_op("rwkv::wkv6", mutates_args=())
def _forward(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states before and between chunks and after, (chunks + 1, B * H, N, N)."""
    r_, k_, v_, rate, u_ = _split_all(r, k, v, w_raw, u, state.dtype)
    decay = torch.exp(-rate)
    scores = torch.diag_embed((r_ * u_ * k_).sum(-1))
    for level in _levels(r_, k_, decay):
        scores = torch.where(level.pairs, level.read @ level.write.mT, scores)

    # `level` is now the whole chunk.
    rows = state.flatten(0, 1)
    whole = level.start[:, -1:] * decay[:, -1:]
    whole, values, writes = (x.view(-1, len(rows), *x.shape[1:]) for x in (whole, v_, level.write))
    states = state.new_empty(len(whole) + 1, *rows.shape)
    states[0] = rows
    for n in range(len(whole)):
        torch.mul(states[n], whole[n], out=states[n + 1])
        states[n + 1].baddbmm_(values[n].mT, writes[n])
    y = (scores @ v_).baddbmm_(level.read, states[:-1].flatten(0, 1).mT)
    return _join(y, r), states[-1].view_as(state).clone(), states


@_forward.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunks = -(-r.shape[1] // _length(r.shape[1]))
    states = state.new_empty(chunks + 1, state.shape[0] * state.shape[1], *state.shape[2:])
    return r.new_empty(r.shape), torch.empty_like(state, memory_format=torch.contiguous_format), states


@torch.library.custom_op("rwkv::wkv6_backward", mutates_args=())
def _backward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, states: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w_raw, u and the first state. The chunks' matrices are made again, not kept.

    The gradient of a log decay is the sum over all that passes it: pairs of a writing s before and a reading t after,
    and the state at either side. Every term has the decay as a factor, so that none is the small difference of large ones.
    """
    r_, k_, v_, rate, u_ = _split_all(r, k, v, w_raw, u, states.dtype)
    dy_ = _split(dy, states.dtype)
    decay = torch.exp(-rate)
    scores = torch.diag_embed((r_ * u_ * k_).sum(-1))
    dscores = dy_ @ v_.mT
    dbonus = dscores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dr, dk = u_ * k_ * dbonus, u_ * r_ * dbonus
    du = (r_ * k_ * dbonus).sum(1).view(-1, *u.shape).sum(0)
    dlog_decay = torch.zeros_like(decay)
    dread, dwrite = torch.empty_like(decay), torch.empty_like(decay)

    def add(level: _Level) -> None:
        """Add what `dread` and `dwrite`, which it overwrites, mean for r, k and the decays of the blocks."""
        dr.addcmul_(dread, level.start)
        dk.addcmul_(dwrite, level.end)
        behind = level.behind.to(decay).expand(len(decay), -1, -1)
        dlog_decay.baddbmm_(behind, dread.mul_(level.read))
        dlog_decay.baddbmm_(behind.mT, dwrite.mul_(level.write))

    for level in _levels(r_, k_, decay):
        scores = torch.where(level.pairs, level.read @ level.write.mT, scores)
        dpairs = dscores * level.pairs
        torch.bmm(dpairs, level.write, out=dread)
        torch.bmm(dpairs.mT, level.read, out=dwrite)
        add(level)

    # `level` is now the whole chunk. The gradient of the state passes backwards as D = D' whole + dy' read.
    rows = dfinal.flatten(0, 1)
    whole = level.start[:, -1:] * decay[:, -1:]
    by_chunk, dys, reads = (x.view(-1, len(rows), *x.shape[1:]) for x in (whole, dy_, level.read))
    grads = torch.empty_like(states)
    grads[-1] = rows
    for n in reversed(range(len(by_chunk))):
        torch.mul(grads[n + 1], by_chunk[n], out=grads[n])
        grads[n].baddbmm_(dys[n].mT, reads[n])
    before, after = states[:-1].flatten(0, 1), grads[1:].flatten(0, 1)
    dv = (scores.mT @ dy_).baddbmm_(level.write, after.mT)
    dlog_decay += whole * (before * after).sum(1, keepdim=True)
    torch.bmm(dy_, before, out=dread)
    torch.bmm(v_, after, out=dwrite)
    add(level)

    dr, dk, dv, dw_raw = (_join(x, like) for x, like in ((dr, r), (dk, k), (dv, v), (dlog_decay.mul_(-rate), w_raw)))
    return dr, dk, dv, dw_raw, du.to(u.dtype), grads[0].clone().view_as(dfinal)


@_backward.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, states: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dk, dv, dw_raw, du = (x.new_empty(x.shape) for x in (r, k, v, w_raw, u))
    return dr, dk, dv, dw_raw, du, states.new_empty(dfinal.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])


def _grad(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dfinal: Tensor, _dstates: Tensor) -> tuple[Tensor, ...]:
    *inputs, states = ctx.saved_tensors  # type: ignore[attr-defined]
    with torch.autocast(dfinal.device.type, enabled=False):
        grads: tuple[Tensor, ...] = _backward(*inputs, states, dy, dfinal)
    return grads


_forward.register_autograd(_grad, setup_context=_save)
