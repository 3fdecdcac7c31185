"""What surrounds WKV-7 in Triton: one pass each, in float32, whatever the dtypes. The operators are in `kernels.time_mix7`.

A program does some tokens of some heads: (tokens, heads, N) values at a time. Memory's bandwidth is the limit; with L values
to a tensor, prepare reads 5 L and writes 4 L (2 L and 4 L in layer 0), its backward reads 9 L and writes 5 L, readout reads 5 L
and writes 1 L, its backward reads 6 L and writes 5 L. At B T = 1024, C = 2560, bfloat16 that is 47, 73, 31 and 58 MB. The
gradients of parameters are summed over a program's tokens, and these sums by torch: 2 or 3 float32 values for each `_SLAB`
tokens, and no atomics, so that the result is the same each time.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024
"""Values at a time: with 4 warps 8 for each thread, one load of 16 bytes in bfloat16."""

_SLAB = 64
"""Tokens that are summed into the gradient of a parameter by one program, unless a tile has more."""


@triton.jit
def _inside(rows, heads, start, SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile's values lie in an activation, and which of them exist; and the same of a parameter."""
    row = start.to(tl.int64) + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    p = head[:, None] * SIZE + column[None, :]
    in_p = (head[:, None] < heads) & (column[None, :] < SIZE)
    x = row[:, None, None] * (heads * SIZE) + p[None, :, :]
    in_x = (row[:, None, None] < rows) & in_p[None, :, :]
    return x, in_x, p, in_p


@triton.jit
def _read(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, at, inside, value):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _prepare(
    k0, v0, v_first, a_raw, v_raw, k_k, k_a, k, v, a, b, rows, heads,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    x, in_x, p, in_p = _inside(rows, heads, tl.program_id(0) * TOKENS, SIZE, TOKENS, HEADS, COLUMNS)
    key, rate = _read(k0, x, in_x), tl.sigmoid(_read(a_raw, x, in_x))
    u = key * _read(k_k, p, in_p)[None]
    kappa = u / tl.maximum(tl.sqrt(tl.sum(u * u, 2)), 1e-12)[:, :, None]
    _write(k, x, in_x, key * (1 + (rate - 1) * _read(k_a, p, in_p)[None]))
    _write(a, x, in_x, -kappa)
    _write(b, x, in_x, kappa * rate)
    value = _read(v0, x, in_x)
    if MIXED:
        value += (_read(v_first, x, in_x) - value) * tl.sigmoid(_read(v_raw, x, in_x))
    _write(v, x, in_x, value)


@triton.jit
def _prepare_backward(
    k0, v_first, a_raw, v_raw, v, k_k, k_a, dk, dv, da, db, dk0, dv0, dv_first, da_raw, dv_raw, sums, rows, heads,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, MIXED: tl.constexpr,
    TILES: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    if WANTED:
        total_k_k = tl.zeros((HEADS, COLUMNS), tl.float32)
        total_k_a = tl.zeros((HEADS, COLUMNS), tl.float32)
    for tile in range(TILES):
        start = (tl.program_id(0) * TILES + tile) * TOKENS
        x, in_x, p, in_p = _inside(rows, heads, start, SIZE, TOKENS, HEADS, COLUMNS)
        along, replace = _read(k_k, p, in_p)[None], _read(k_a, p, in_p)[None]
        key, raw = _read(k0, x, in_x), _read(a_raw, x, in_x)
        rate, rest = tl.sigmoid(raw), tl.sigmoid(-raw)  # 1 - rate has no correct digit left at raw = 17
        u = key * along
        length = tl.sqrt(tl.sum(u * u, 2))[:, :, None]
        scale = 1 / tl.maximum(length, 1e-12)
        kappa = u * scale
        gk, gb = _read(dk, x, in_x), _read(db, x, in_x)
        dkappa = rate * gb - _read(da, x, in_x)
        inner = tl.sum(kappa * dkappa, 2)[:, :, None]
        du = (dkappa - tl.where(length < 1e-12, 0.0, inner) * kappa) * scale  # so short, kappa is u times a constant
        _write(dk0, x, in_x, gk * (1 - rest * replace) + du * along)
        _write(da_raw, x, in_x, (gk * key * replace + gb * kappa) * rate * rest)
        if WANTED:
            total_k_k += tl.sum(du * key, 0)
            total_k_a -= tl.sum(gk * key * rest, 0)
        gv = _read(dv, x, in_x)
        if MIXED:
            z = _read(v_raw, x, in_x)
            first = tl.sigmoid(z)
            _write(dv_raw, x, in_x, gv * (_read(v_first, x, in_x) - _read(v, x, in_x)) * first)
            _write(dv_first, x, in_x, gv * first)
            gv *= tl.sigmoid(-z)
        _write(dv0, x, in_x, gv)
    if WANTED:
        _, _, p, in_p = _inside(rows, heads, tl.program_id(0), SIZE, TOKENS, HEADS, COLUMNS)
        sums += tl.program_id(0).to(tl.int64) * 2 * heads * SIZE
        _write(sums, p, in_p, total_k_k)
        _write(sums + heads * SIZE, p, in_p, total_k_a)


@triton.jit
def _readout(
    y, r, k, v, g, weight, bias, r_k, out, rows, heads, eps,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    x, in_x, p, in_p = _inside(rows, heads, tl.program_id(0) * TOKENS, SIZE, TOKENS, HEADS, COLUMNS)
    value = _read(y, x, in_x)
    centred = tl.where(in_x, value - (tl.sum(value, 2) / SIZE)[:, :, None], 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 2) / SIZE + eps)[:, :, None]
    bonus = tl.sum(_read(r, x, in_x) * _read(k, x, in_x) * _read(r_k, p, in_p)[None], 2)[:, :, None]
    read = normed * _read(weight, p, in_p)[None] + _read(bias, p, in_p)[None] + bonus * _read(v, x, in_x)
    _write(out, x, in_x, read * _read(g, x, in_x))


@triton.jit
def _readout_backward(
    y, r, k, v, g, weight, bias, r_k, dout, dy, dr, dk, dv, dg, sums, rows, heads, eps,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    WANTED: tl.constexpr,
):  # fmt: skip
    if WANTED:
        total_weight = tl.zeros((HEADS, COLUMNS), tl.float32)
        total_bias = tl.zeros((HEADS, COLUMNS), tl.float32)
        total_r_k = tl.zeros((HEADS, COLUMNS), tl.float32)
    for tile in range(TILES):
        start = (tl.program_id(0) * TILES + tile) * TOKENS
        x, in_x, p, in_p = _inside(rows, heads, start, SIZE, TOKENS, HEADS, COLUMNS)
        value, gamma, rho = _read(y, x, in_x), _read(weight, p, in_p)[None], _read(r_k, p, in_p)[None]
        centred = tl.where(in_x, value - (tl.sum(value, 2) / SIZE)[:, :, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(centred * centred, 2) / SIZE + eps)[:, :, None]
        normed = centred * scale
        grad = _read(dout, x, in_x)
        q = grad * _read(g, x, in_x)
        d = q * gamma
        mean_d, mean_dx = (tl.sum(d, 2) / SIZE)[:, :, None], (tl.sum(d * normed, 2) / SIZE)[:, :, None]
        _write(dy, x, in_x, scale * (d - mean_d - normed * mean_dx))
        read, key, bonus_of = _read(r, x, in_x), _read(k, x, in_x), _read(v, x, in_x)
        bonus, dbonus = tl.sum(read * key * rho, 2)[:, :, None], tl.sum(q * bonus_of, 2)[:, :, None]
        _write(dg, x, in_x, grad * (normed * gamma + _read(bias, p, in_p)[None] + bonus * bonus_of))
        _write(dr, x, in_x, dbonus * key * rho)
        _write(dk, x, in_x, dbonus * read * rho)
        _write(dv, x, in_x, bonus * q)
        if WANTED:
            total_weight += tl.sum(q * normed, 0)
            total_bias += tl.sum(q, 0)
            total_r_k += tl.sum(dbonus * read * key, 0)
    if WANTED:
        _, _, p, in_p = _inside(rows, heads, tl.program_id(0), SIZE, TOKENS, HEADS, COLUMNS)
        sums += tl.program_id(0).to(tl.int64) * 3 * heads * SIZE
        _write(sums, p, in_p, total_weight)
        _write(sums + heads * SIZE, p, in_p, total_bias)
        _write(sums + 2 * heads * SIZE, p, in_p, total_r_k)


def tile(heads: int, size: int) -> dict[str, int]:
    """The kernels' tile: heads so small that a row of one would be a small part of a cache line go together."""
    columns = triton.next_power_of_2(size)
    together = min(triton.next_power_of_2(heads), max(1, 64 // columns))
    return {"SIZE": size, "TOKENS": max(1, _TILE // (together * columns)), "HEADS": together, "COLUMNS": columns}


def prepare(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `kernels.time_mix7._prepare`."""
    inputs = _contiguous(k0, v0, v_first, a_raw, v_raw, k_k, k_a)
    heads = k_k.numel() // size
    k, v, a, b = (x.new_empty((*k0.shape[:-1], heads, size)) for x in (k0, v0, k0, k0))
    rows, sizes = k0.numel() // k_k.numel(), tile(heads, size)
    with _device(k0):
        _prepare[_grid(rows, heads, sizes)](*inputs, k, v, a, b, rows, heads, **sizes, MIXED=v_first is not None)
    return k, v, a, b


def prepare_backward(
    k0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, v: Tensor | None, k_k: Tensor, k_a: Tensor,
    dk: Tensor, dv: Tensor, da: Tensor, db: Tensor, size: int, wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `kernels.time_mix7._prepare_backward`."""
    inputs = _contiguous(k0, v_first, a_raw, v_raw, v, k_k, k_a, dk, dv, da, db)
    grads = [None if x is None else x.new_empty(k0.shape) for x in (k0, dv, v_first, a_raw, v_raw)]
    heads = k_k.numel() // size
    rows, sizes = k0.numel() // k_k.numel(), tile(heads, size)
    grid, tiles = _slabs(rows, heads, sizes, wanted)
    sums = torch.empty(grid[0], 2, k_k.numel(), device=k0.device) if wanted else None
    with _device(k0):
        _prepare_backward[grid](
            *inputs, *grads, sums, rows, heads, **sizes, MIXED=v_first is not None, TILES=tiles, WANTED=wanted
        )
    return *(k0.new_empty(0) if x is None else x for x in grads), *_totals(sums, (k_k, k_a))


def readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    """See `kernels.time_mix7._readout`."""
    heads, size = y.shape[-2:]
    rows, sizes = y.numel() // (heads * size), tile(heads, size)
    out = y.new_empty(g.shape)
    with _device(y):
        _readout[_grid(rows, heads, sizes)](
            *_contiguous(y, r, k, v, g, weight, bias, r_k), out, rows, heads, eps, **sizes
        )
    return out


def readout_backward(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, dout: Tensor,
    eps: float, wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `kernels.time_mix7._readout_backward`."""
    heads, size = y.shape[-2:]
    rows, sizes = y.numel() // (heads * size), tile(heads, size)
    inputs = _contiguous(y, r, k, v, g, weight, bias, r_k, dout)
    grads = [x.new_empty(x.shape) for x in (y, r, k, v, g)]
    grid, tiles = _slabs(rows, heads, sizes, wanted)
    sums = torch.empty(grid[0], 3, heads * size, device=y.device) if wanted else None
    with _device(y):
        _readout_backward[grid](*inputs, *grads, sums, rows, heads, eps, **sizes, TILES=tiles, WANTED=wanted)
    return *grads, *_totals(sums, (weight, bias, r_k))


def _contiguous(*xs: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in xs]


def _device(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.get_device())


def _grid(rows: int, heads: int, sizes: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, sizes["TOKENS"]), triton.cdiv(heads, sizes["HEADS"])


def _slabs(rows: int, heads: int, sizes: dict[str, int], wanted: bool) -> tuple[tuple[int, int], int]:
    """The programs of a backward, and the tiles of each."""
    tiles = max(1, _SLAB // sizes["TOKENS"]) if wanted else 1
    tokens, others = _grid(rows, heads, sizes)
    return (triton.cdiv(tokens, tiles), others), tiles


def _totals(sums: Tensor | None, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of parameters, in their shapes and dtypes; empty ones without sums."""
    if sums is None:
        return tuple(p.new_empty(0) for p in parameters)
    totals = zip(sums.sum(0), parameters, strict=True)
    return tuple(total.view(p.shape).to(p.dtype, copy=True) for total, p in totals)
