"""Token shift in Triton, in float32 whatever the dtypes. The operator is in `kernels.token_shift`.

Forward, and backward to x: a program does some tokens of one sequence, one after the other, and all channels of each, so that
the token before and what the token behind asks of it stay in registers. Memory's bandwidth is the limit: of tensors of the
size of x, M mixes read 1 and write M forward, and read M + 1 and write 1 backward; and a token at each program's border again.
The gradients of parameters, where they are wanted, need no sums over channels: a pass of their own sums tiles of tokens by
channels, and torch these sums, so that the result is the same each time.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_MANY = 8192
"""From so many tokens on, a program does more of them: there are enough programs for any GPU."""

_TILE = (32, 64)
"""Tokens by channels that one program sums into the gradients of parameters."""


@triton.jit
def _read(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, at, inside, value):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, row, weight, bias, eps, size, c, NORM: tl.constexpr):
    """A token, its mean and 1 / deviation."""
    value = _read(x, row * size + c, c < size)
    mean = 0.0
    scale = 1.0
    if NORM:
        mean = tl.sum(value, 0) / size
        value = tl.where(c < size, value - mean, 0.0)
        scale = 1 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
        value = value * scale * _read(weight, c, c < size) + _read(bias, c, c < size)
    return value, mean, scale


@triton.jit
def _forward(
    x, last, mus, weight, bias, eps, z, final, statistics, steps, size,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, MIXES: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    c = tl.arange(0, BLOCK)
    inside = c < size
    if start == 0:
        before = _read(last, b * size + c, inside)
    else:
        before, _, _ = _normed(x, b * steps + start - 1, weight, bias, eps, size, c, NORM)
    for i in range(TOKENS):
        if start + i < steps:
            row = b * steps + start + i
            now, mean, scale = _normed(x, row, weight, bias, eps, size, c, NORM)
            if KEEP:
                tl.store(statistics + 2 * row, mean)
                tl.store(statistics + 2 * row + 1, scale)
            change = before - now
            for m in tl.static_range(MIXES):
                _write(z[m], row * size + c, inside, now + change * _read(mus, m * size + c, inside))
            before = now
    if start + TOKENS >= steps:
        _write(final, b * size + c, inside, before)


@triton.jit
def _backward(
    dz, dfinal, x, mus, weight, statistics, dx, dlast, steps, size,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, MIXES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    c = tl.arange(0, BLOCK)
    inside = c < size
    after = tl.zeros((BLOCK,), tl.float32)  # what the token behind asks of this one
    if start + TOKENS >= steps:
        after += _read(dfinal, b * size + c, inside)
    else:
        for m in tl.static_range(MIXES):
            after += _read(dz[m], (b * steps + start + TOKENS) * size + c, inside) * _read(mus, m * size + c, inside)
    for i in range(TOKENS):
        t = start + TOKENS - 1 - i
        if t < steps:
            row = b * steps + t
            own = tl.zeros((BLOCK,), tl.float32)
            passed = tl.zeros((BLOCK,), tl.float32)
            for m in tl.static_range(MIXES):
                g = _read(dz[m], row * size + c, inside)
                own += g
                passed += g * _read(mus, m * size + c, inside)
            own += after - passed
            after = passed
            if NORM:
                mean = tl.load(statistics + 2 * row)
                scale = tl.load(statistics + 2 * row + 1)
                value = (_read(x, row * size + c, inside) - mean) * scale
                own *= _read(weight, c, inside)
                own = (own - tl.sum(own, 0) / size - value * (tl.sum(own * value, 0) / size)) * scale
            _write(dx, row * size + c, inside, own)
    if start == 0:
        _write(dlast, b * size + c, inside, after)


@triton.jit
def _of_parameters(
    dz, dfinal, x, last, mus, weight, bias, statistics, sums, steps, rows, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MIXES: tl.constexpr, NORM: tl.constexpr,
    OF_MUS: tl.constexpr, OF_NORM: tl.constexpr,
):  # fmt: skip
    """Sums over a tile's tokens, (tiles, rows of gradients, C): those of the mus, then the weight's and the bias's."""
    tile = tl.program_id(0).to(tl.int64)
    row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (c < size)
    t = row % steps
    b = row // steps
    value = _read(x, row * size + c, inside)
    earlier = inside & (t > 0)
    before = _read(x, (row - 1) * size + c, earlier)
    if NORM:
        mean = tl.load(statistics + 2 * row, mask=row < rows, other=0.0)
        scale = tl.load(statistics + 2 * row + 1, mask=row < rows, other=0.0)
        value = (value - mean) * scale
    if OF_MUS:
        now = value
        if NORM:
            mean = tl.load(statistics + 2 * row - 2, mask=(row < rows) & (t > 0), other=0.0)
            scale = tl.load(statistics + 2 * row - 1, mask=(row < rows) & (t > 0), other=0.0)
            by = _read(weight, c, c < size)
            add = _read(bias, c, c < size)
            now = value * by + add
            before = (before - mean) * scale * by + add
        change = tl.where(t > 0, before, _read(last, b * size + c, inside & (t == 0))) - now
    dn = tl.zeros((ROWS, COLUMNS), tl.float32)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    to = tile * ((MIXES if OF_MUS else 0) + (2 if OF_NORM else 0)) * size + column
    for m in tl.static_range(MIXES):
        g = _read(dz[m], row * size + c, inside)
        if OF_MUS:
            tl.store(sums + to, tl.sum(tl.where(inside, g * change, 0.0), 0), mask=column < size)
            to += size
        if OF_NORM:
            share = _read(mus, m * size + c, c < size)
            dn += g - g * share + _read(dz[m], (row + 1) * size + c, inside & (t + 1 < steps)) * share
    if OF_NORM:
        dn += _read(dfinal, b * size + c, inside & (t + 1 == steps))
        tl.store(sums + to, tl.sum(tl.where(inside, dn * value, 0.0), 0), mask=column < size)
        tl.store(sums + to + size, tl.sum(dn, 0), mask=column < size)


def _schedule(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of a pass by tokens, and how a program is made."""
    batch, steps, size = x.shape
    tokens = 4 if batch * steps < _MANY else 16
    block = triton.next_power_of_2(size)
    warps = min(16, max(4, block // 256))
    return (batch, triton.cdiv(steps, tokens)), {"TOKENS": tokens, "BLOCK": block, "num_warps": warps}


def forward(
    x: Tensor, last: Tensor, mus: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    z: Sequence[Tensor], final: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    """Fill z, `final` and `statistics`, which stays empty where nothing is kept; see `kernels.token_shift`."""
    _, steps, size = x.shape
    grid, made = _schedule(x)
    with torch.cuda.device_of(x):
        _forward[grid](
            x, last, mus, weight, bias, eps, tuple(z), final, statistics, steps, size,
            MIXES=len(z), NORM=weight is not None, KEEP=statistics.numel() > 0, **made,
        )  # fmt: skip


def backward(
    dz: Sequence[Tensor], dfinal: Tensor, x: Tensor, last: Tensor, mus: Tensor, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, dx: Tensor, dlast: Tensor, dmus: Tensor, dweight: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """Fill the gradients; those of parameters are float32, and empty where they are not wanted."""
    batch, steps, size = x.shape
    rows, mixes, norm = batch * steps, len(dz), weight is not None
    grid, made = _schedule(x)
    of_mus, of_norm = dmus.numel() > 0, dweight.numel() > 0
    with torch.cuda.device_of(x):
        _backward[grid](
            tuple(dz), dfinal, x, mus, weight, statistics, dx, dlast, steps, size, MIXES=mixes, NORM=norm, **made
        )
        if not of_mus and not of_norm:
            return
        tiles = triton.cdiv(rows, _TILE[0])
        sums = dmus.new_empty(tiles, mixes * of_mus + 2 * of_norm, size)
        _of_parameters[(tiles, triton.cdiv(size, _TILE[1]))](
            tuple(dz), dfinal, x, last, mus, weight, bias, statistics, sums, steps, rows, size,
            ROWS=_TILE[0], COLUMNS=_TILE[1], MIXES=mixes, NORM=norm, OF_MUS=of_mus, OF_NORM=of_norm, num_warps=4,
        )  # fmt: skip
        total = sums.sum(0)
        if of_mus:
            dmus.copy_(total[:mixes])
        if of_norm:
            dweight.copy_(total[-2])
            dbias.copy_(total[-1])
