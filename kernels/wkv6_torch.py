"""WKV-6 in chunks, by torch's matrix products. The operator and its notation are in `kernels.wkv6`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16
"""Steps that become matrix products together: a power of two. Every length is as accurate as the step-by-step form."""

# From chunk to chunk the state passes as S' = S diag(D) + V' K, D the product of the chunk's decays.
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


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised."""
    batch, heads, size, _ = state.shape
    return state.new_empty(-(-steps // _length(steps)) + 1, batch * heads, size, size)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv6`. Kept are the states before, between and after the chunks, (chunks + 1, B * H, N, N)."""
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
    return _join(y, r), states[-1].view_as(state).clone(), states if keep else state.new_empty(0)


def backward(
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
