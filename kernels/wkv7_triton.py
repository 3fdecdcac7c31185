"""WKV-7 in Triton: chunks in parallel in time, on NVIDIA and AMD. The operator and its notation are in `kernels.wkv7`.

Rows t = 1..L of a chunk, S the state before it, S' the one after. In a product of rows the decays between them count; a bar
below, a_, marks rows decayed to the border of the chunk where the state comes from (a_, r_), or goes to (k_, b_).

    u = U + W S^T         W = M a_,  U = M tril(a k^T, -1) v,  M = (I - tril(a b^T, -1))^{-1}
    y = tril(r k^T) v + tril(r b^T) u + r_ S^T
    S' = S diag(e^{c_L}) + v^T k_ + u^T b_

The gradient of the state obeys the same equations backwards in time, where a and b, k and r, v and dy trade places, with z
for u and dv for y. So three kernels serve both directions: `_prepare` makes W and U of all chunks at once, `_scan` takes the
state through them, `_outputs` makes y, or dv, of all chunks at once. `_gradients` makes the others. The states before each
`KEPT` steps are kept for the backward; those between are made again, from u.

The form is the WY representation of the products of I - kappa kappa', as for DeltaNet: Yang et al. 2024, arXiv:2406.06484.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KEPT = 64
"""Steps from one kept state to the next."""

_KEPT = tl.constexpr(KEPT)
_LOG_DECAY_MIN = tl.constexpr(-math.exp(-0.5))

# Tiles: (L, KEYS) or (L, VALUES) rows of one head, and (VALUES, KEYS) states; both widths are powers of 2. Of a chunk's rows
# only the first `count` exist, and of the columns N: the rest is read as 0, which adds nothing. The inputs are (B, T, H, N);
# what passes between kernels is float32: c, the running sum of the log decays, W and u are (B H, T, N), states are
# (slots, B H, N, N). c starts anew in each chunk. Factors of products are scaled around its middle row, so that none leaves
# the range of float32.


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, at, inside, value):
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _inside(first, columns, T, N: tl.constexpr, L: tl.constexpr):
    """Which values of the rows from `first` on exist."""
    return (tl.arange(0, L) < T - first)[:, None] & (columns < N)[None, :]


@triton.jit
def _at(columns, stride, L: tl.constexpr):
    """Where L rows of these columns lie, from the first row on."""
    return tl.arange(0, L)[:, None] * stride + columns[None, :]


@triton.jit
def _row(head, first, T, H, N: tl.constexpr):
    """Where a row of a head begins in (B, T, H, N)."""
    return (((head // H).to(tl.int64) * T + first) * H + head % H) * N


@triton.jit
def _own_row(head, first, T, N: tl.constexpr):
    """And in (B H, T, N)."""
    return (head.to(tl.int64) * T + first) * N


@triton.jit
def _square(slot, heads, head, values, keys, N: tl.constexpr):
    """Where the state of a head lies in (slots, B H, N, N), and which of its values exist."""
    at = (head.to(tl.int64) + slot * heads) * (N * N)
    return at + values[:, None] * N + keys[None, :], (values < N)[:, None] & (keys < N)[None, :]


@triton.jit
def _before(c, at, inside, N: tl.constexpr, L: tl.constexpr):
    """c without the row's own decay."""
    return _load(c - N, at, inside & (tl.arange(0, L) > 0)[:, None])


@triton.jit
def _last(c, count, keys, N: tl.constexpr):
    """c of row `count` - 1."""
    return tl.load(c + (count - 1) * N + keys, mask=keys < N, other=0.0)


@triton.jit
def _from_middle(c, middle, LATER: tl.constexpr):
    """The scale of a row that is later in products than its partner, or earlier."""
    return tl.exp(c - middle[None, :]) if LATER else tl.exp(middle[None, :] - c)


@triton.jit
def _to_border(c, end, START: tl.constexpr):
    """The decays between a row and the start of the chunk, or its end."""
    return tl.exp(c) if START else tl.exp(end[None, :] - c)


@triton.jit
def _pairs(L: tl.constexpr, UPPER: tl.constexpr, DIAGONAL: tl.constexpr):
    """Which pairs of a row and a column are of a step and an earlier one; of a later one, if UPPER."""
    row, column = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    pairs = row < column if UPPER else row > column
    return pairs | (row == column) if DIAGONAL else pairs


@triton.jit
def _inverse(x, L: tl.constexpr, PRECISION: tl.constexpr):
    """(I - x)^{-1} of a strictly triangular x. The inverses of two neighbouring blocks and what stands beside them give that
    of both. The product of I + x^(2^i), as long, loses all digits where the keys are much alike: its terms are huge.
    """
    row, column = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.where(row >> 1 == column >> 1, x, 0.0)
    levels: tl.constexpr = 4 if L == 16 else 5 if L == 32 else 6
    for level in tl.static_range(1, levels):
        beside = (row >> level != column >> level) & (row >> level + 1 == column >> level + 1)
        product = tl.dot(tl.where(beside, x, 0.0), inverse, input_precision=PRECISION)
        inverse = tl.dot(inverse, product, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def _prepare(
    a, b, k, v, w, c, by_state, u, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """W and U of one chunk, and forwards c. Backwards, a is b, b is a, k is r and v is dy."""
    head, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * L
    keys = tl.arange(0, KEYS)
    inside, at, own_at = _inside(first, keys, T, N, L), _at(keys, H * N, L), _at(keys, N, L)
    start, own_start = _row(head, first, T, H, N), _own_row(head, first, T, N)
    c += own_start
    if REVERSE:
        count = tl.minimum(T - first, L)
        until, before = _load(c, own_at, inside), _before(c, own_at, inside, N, L)
        end, middle = _last(c, count, keys, N), _last(c, tl.minimum(count, L // 2), keys, N)
        read, written = until, before
    else:
        log_decay = tl.where(inside, _LOG_DECAY_MIN * tl.sigmoid(_load(w + start, at, inside)), 0.0)
        until = tl.cumsum(log_decay, 0)
        _store(c, own_at, inside, until)
        middle = tl.sum(tl.where((tl.arange(0, L) == L // 2 - 1)[:, None], until, 0.0), 0)
        end = middle  # not used
        read, written = until - log_decay, until
    a_tile = _load(a + start, at, inside)
    left = a_tile * _from_middle(read, middle, not REVERSE)
    right = _load(b + start, at, inside) * _from_middle(written, middle, REVERSE)
    ab = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    inverse = _inverse(tl.where(_pairs(L, REVERSE, False), ab, 0.0), L, PRECISION)
    a_tile *= _to_border(read, end, not REVERSE)
    _store(by_state + own_start, own_at, inside, tl.dot(inverse, a_tile, input_precision=PRECISION))
    right = _load(k + start, at, inside) * _from_middle(until, middle, REVERSE)
    ak = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    ak = tl.where(_pairs(L, REVERSE, REVERSE), ak, 0.0)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside_v = _inside(first, values, T, N, L)
        v_tile = _load(v + start, _at(values, H * N, L), inside_v)
        own = tl.dot(inverse, tl.dot(ak, v_tile, input_precision=PRECISION), input_precision=PRECISION)
        _store(u + own_start, _at(values, N, L), inside_v, own)


@triton.jit
def _scan(
    starts, states, kept, k, b, v, c, by_state, u, T, H, heads, chunks, many,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Turns U into u in `many` chunks, one after another, and stores the states at their borders.

    Backwards, where k is r, b is a and v is dy, the states are gradients.
    """
    stride: tl.constexpr = _KEPT // L
    blocks: tl.constexpr = (N + VALUES - 1) // VALUES
    head, segment = tl.program_id(0) // blocks % heads, tl.program_id(0) // (blocks * heads)
    keys, values = tl.arange(0, KEYS), tl.program_id(0) % blocks * VALUES + tl.arange(0, VALUES)
    at, own_at, v_at, u_at = _at(keys, H * N, L), _at(keys, N, L), _at(values, H * N, L), _at(values, N, L)
    square, in_square = _square(segment, heads, head, values, keys, N)
    state = tl.load(starts + square, mask=in_square, other=0.0)
    last = tl.minimum(segment * many + many, chunks)
    for i in range(segment * many, last):
        chunk = chunks - 1 - i if REVERSE else i
        square, _ = _square(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
        tl.store(states + square, state, mask=in_square)
        if KEEP:
            if chunk % stride == 0:
                square, _ = _square(chunk // stride, heads, head, values, keys, N)
                tl.store(kept + square, state, mask=in_square)
        first = chunk * L
        start, own_start = _row(head, first, T, H, N), _own_row(head, first, T, N)
        inside, inside_v = _inside(first, keys, T, N, L), _inside(first, values, T, N, L)
        u_tile = _load(u + own_start, u_at, inside_v)
        u_tile = tl.dot(_load(by_state + own_start, own_at, inside), tl.trans(state), u_tile, input_precision=PRECISION)
        _store(u + own_start, u_at, inside_v, u_tile)
        until, end = _load(c + own_start, own_at, inside), _last(c + own_start, tl.minimum(T - first, L), keys, N)
        k_tile = _load(k + start, at, inside) * _to_border(until, end, REVERSE)
        if REVERSE:
            until = _before(c + own_start, own_at, inside, N, L)
        b_tile = _load(b + start, at, inside) * _to_border(until, end, REVERSE)
        v_tile = _load(v + start, v_at, inside_v)
        state = tl.dot(tl.trans(v_tile), k_tile, state * tl.exp(end)[None, :], input_precision=PRECISION)
        state = tl.dot(tl.trans(u_tile), b_tile, state, input_precision=PRECISION)
    if last == chunks:
        square, _ = _square(0 if REVERSE else chunks, heads, head, values, keys, N)
        tl.store(states + square, state, mask=in_square)


@triton.jit
def _outputs(
    states, r, k, b, v, u, c, y, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """y of one chunk. Backwards dv: r is k, k is r, b is a, v is dy."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    count = tl.minimum(T - first, L)
    keys = tl.arange(0, KEYS)
    inside, at, own_at = _inside(first, keys, T, N, L), _at(keys, H * N, L), _at(keys, N, L)
    start, own_start = _row(head, first, T, H, N), _own_row(head, first, T, N)
    c_here = c + own_start
    until = _load(c_here, own_at, inside)
    end, middle = _last(c_here, count, keys, N), _last(c_here, tl.minimum(count, L // 2), keys, N)
    r_tile = _load(r + start, at, inside)
    left = r_tile * _from_middle(until, middle, not REVERSE)
    right = _load(k + start, at, inside) * _from_middle(until, middle, REVERSE)
    rk = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    rk = tl.where(_pairs(L, REVERSE, True), rk, 0.0)
    r_tile *= _to_border(until, end, not REVERSE)
    if REVERSE:
        until = _before(c_here, own_at, inside, N, L)
    right = _load(b + start, at, inside) * _from_middle(until, middle, REVERSE)
    rb = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    rb = tl.where(_pairs(L, REVERSE, not REVERSE), rb, 0.0)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside_v, at_v = _inside(first, values, T, N, L), _at(values, H * N, L)
        square, in_square = _square(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
        state = tl.load(states + square, mask=in_square, other=0.0)
        out = tl.dot(r_tile, tl.trans(state), input_precision=PRECISION)
        out = tl.dot(rk, _load(v + start, at_v, inside_v), out, input_precision=PRECISION)
        u_tile = _load(u + own_start, _at(values, N, L), inside_v)
        _store(y + start, at_v, inside_v, tl.dot(rb, u_tile, out, input_precision=PRECISION))


@triton.jit
def _gradients(
    states, grads, r, a, k, b, dy, z, v, u, c, w, sums, dr, da, dw, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """dr and da of one chunk. Backwards dk and db, from `grads`: r is k, a is b, dy is v, z is u; and the other way round.

    The gradient of the decays follows from these four. Of step t it is the sum of what all states gain from the steps
    behind: r dr at t and later and a da after t, less k dk and b db at t and later, and what the last state of the
    chunk gains.
    """
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    start, own_start = _row(head, first, T, H, N), _own_row(head, first, T, N)
    keys = tl.arange(0, KEYS)
    rk, rb = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    ak, ab = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    r_grad, a_grad = tl.zeros((L, KEYS), tl.float32), tl.zeros((L, KEYS), tl.float32)
    dlog_decay = tl.zeros((KEYS,), tl.float32)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside, at, own_at = _inside(first, values, T, N, L), _at(values, H * N, L), _at(values, N, L)
        dy_tile, z_tile = _load(dy + start, at, inside), _load(z + own_start, own_at, inside)
        v_tile, u_tile = _load(v + start, at, inside), _load(u + own_start, own_at, inside)
        rk = tl.dot(dy_tile, tl.trans(v_tile), rk, input_precision=PRECISION)
        ak = tl.dot(z_tile, tl.trans(v_tile), ak, input_precision=PRECISION)
        rb = tl.dot(dy_tile, tl.trans(u_tile), rb, input_precision=PRECISION)
        ab = tl.dot(z_tile, tl.trans(u_tile), ab, input_precision=PRECISION)
        square, in_square = _square(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
        state = tl.load((grads if REVERSE else states) + square, mask=in_square, other=0.0)
        r_grad = tl.dot(dy_tile, state, r_grad, input_precision=PRECISION)
        a_grad = tl.dot(z_tile, state, a_grad, input_precision=PRECISION)
        if REVERSE:
            dlog_decay += tl.sum(tl.load(states + square, mask=in_square, other=0.0) * state, 0)

    inside, at, own_at = _inside(first, keys, T, N, L), _at(keys, H * N, L), _at(keys, N, L)
    c += own_start
    count = tl.minimum(T - first, L)
    until, before = _load(c, own_at, inside), _before(c, own_at, inside, N, L)
    end, middle = _last(c, count, keys, N), _last(c, tl.minimum(count, L // 2), keys, N)
    of_a, of_b = (until, before) if REVERSE else (before, until)
    k_tile = _load(k + start, at, inside) * _from_middle(until, middle, REVERSE)
    rk, ak = tl.where(_pairs(L, REVERSE, True), rk, 0.0), tl.where(_pairs(L, REVERSE, REVERSE), ak, 0.0)
    r_pairs, a_pairs = tl.dot(rk, k_tile, input_precision=PRECISION), tl.dot(ak, k_tile, input_precision=PRECISION)
    b_tile = _load(b + start, at, inside) * _from_middle(of_b, middle, REVERSE)
    rb, ab = tl.where(_pairs(L, REVERSE, not REVERSE), rb, 0.0), tl.where(_pairs(L, REVERSE, False), ab, 0.0)
    r_pairs = tl.dot(rb, b_tile, r_pairs, input_precision=PRECISION)
    a_pairs = tl.dot(ab, b_tile, a_pairs, input_precision=PRECISION)
    r_grad = r_grad * _to_border(until, end, not REVERSE) + r_pairs * _from_middle(until, middle, not REVERSE)
    a_grad = a_grad * _to_border(of_a, end, not REVERSE) + a_pairs * _from_middle(of_a, middle, not REVERSE)
    _store(dr + start, at, inside, r_grad)
    _store(da + start, at, inside, a_grad)

    r_grad *= _load(r + start, at, inside)
    a_grad *= _load(a + start, at, inside)
    behind = tl.cumsum(r_grad + a_grad, 0, reverse=True)
    if REVERSE:
        raw = _load(w + start, at, inside)
        # sigmoid(-w) rather than 1 - sigmoid(w), which has no correct digit left at w = 17
        slope = _LOG_DECAY_MIN * tl.sigmoid(raw) * tl.sigmoid(-raw)
        dlog_decay = dlog_decay[None, :] + (_load(sums + own_start, own_at, inside) - behind)
        _store(dw + start, at, inside, dlog_decay * slope)
    else:
        _store(sums + own_start, own_at, inside, behind - a_grad)


def kept(steps: int, state: Tensor) -> Tensor:
    """Memory for what `forward` keeps: the states before each `KEPT` steps."""
    batch, heads, size, _ = state.shape
    return state.new_empty((triton.cdiv(steps, KEPT), batch * heads, size, size), dtype=torch.float32)


def forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and what `backward` needs if `keep`."""
    constants, dtype = sizes(r.shape[-1], r.dtype), r.dtype
    r, w, k, v, a, b = (_readable(x) for x in (r, w_raw, k, v, a, b))
    y, to_keep = torch.empty_like(r), kept(r.shape[1], state) if keep else state.new_empty(0)
    with torch.cuda.device_of(r):
        u, c, states = _pass(a, b, k, v, w, state.float().contiguous(), to_keep, constants)
        _each_chunk(_outputs, r, constants)(states, r, k, b, v, u, c, y, REVERSE=False)
    return y.to(dtype), states[-1].view(state.shape).to(state.dtype, copy=True), to_keep


def backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of r, w_raw, k, v, a, b and the first state."""
    constants, dtypes = sizes(r.shape[-1], r.dtype), [x.dtype for x in (r, w_raw, k, v, a, b)]
    r, w, k, v, a, b, dy = (_readable(x) for x in (r, w_raw, k, v, a, b, dy))
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in (r, w, k, v, a, b))
    with torch.cuda.device_of(r):
        u, c, states = _pass(a, b, k, v, w, kept, kept.new_empty(0), constants)
        end = dfinal.float().contiguous()
        z, c, grads = _pass(b, a, r, dy, c, end, kept.new_empty(0), constants, reverse=True)
        _each_chunk(_outputs, r, constants)(grads, k, r, a, dy, z, c, dv, REVERSE=True)
        sums = torch.empty_like(c)
        start = _each_chunk(_gradients, r, constants)
        start(states, grads, r, a, k, b, dy, z, v, u, c, w, sums, dr, da, dw, REVERSE=False)
        start(states, grads, k, b, r, a, v, u, dy, z, c, w, sums, dk, db, dw, REVERSE=True)
    dstate = grads[0].view(dfinal.shape).to(dfinal.dtype, copy=True)
    return *(x.to(dtype) for x, dtype in zip((dr, dw, dk, dv, da, db), dtypes, strict=True)), dstate


def sizes(size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of all kernels, for heads of `size` channels and r of `dtype`.

    In float32 products are exact, as the reference's are, and chunks are short: the exponents of 16 steps cost no digits.
    With 16 bits to an input, tensor cores round less than the inputs were, and longer chunks keep them busier.
    """
    exact = dtype == torch.float32
    keys = max(16, triton.next_power_of_2(size))
    return {
        "N": size,
        "KEYS": keys,
        "VALUES": min(64, keys, max(16, 4096 // keys)),  # a state of at most 16 KB, a quarter of 4 warps' registers
        "L": 16 if exact or keys > 128 else 32,
        "PRECISION": "ieee" if exact or torch.version.hip else "tf32",
    }


def _readable(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.float()).contiguous()


def _each_chunk(kernel: Any, x: Tensor, constants: dict[str, Any]) -> Callable[..., None]:
    """Starts a program of the kernel for each chunk of each head of x."""
    batch, steps, heads, _ = x.shape
    chunks = triton.cdiv(steps, constants["L"])

    def start(*tensors: Tensor, **flags: bool) -> None:
        kernel[(chunks * batch * heads,)](*tensors, steps, heads, batch * heads, chunks, **constants, **flags)

    return start


def _pass(
    a: Tensor, b: Tensor, k: Tensor, v: Tensor, w: Tensor, starts: Tensor, to_keep: Tensor, constants: dict[str, Any],
    *, reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """u, c, and the states at the borders of all chunks; backwards, where w is c, z, c, and the gradients there.

    Args:
        a, b, k, v, w: (B, T, H, N), but for c.
        starts: the first state, from which all chunks follow; or those kept, each of which begins anew.
        to_keep: memory for those to keep, or empty.
        constants: of the kernels.
        reverse: backwards.
    """
    batch, steps, heads, size = a.shape
    rows, chunks = batch * heads, triton.cdiv(steps, constants["L"])
    by_state, u = (a.new_empty((rows, steps, size), dtype=torch.float32) for _ in range(2))
    c = w if reverse else torch.empty_like(u)
    states = u.new_empty((chunks + 1, rows, size, size))
    _each_chunk(_prepare, a, constants)(a, b, k, v, w, c, by_state, u, REVERSE=reverse)
    segments = starts.numel() // states[0].numel()
    many = KEPT // constants["L"] if segments > 1 else chunks
    constants = constants | {"VALUES": min(constants["VALUES"], 32)}
    _scan[(triton.cdiv(size, constants["VALUES"]) * rows * segments,)](
        starts, states, to_keep, k, b, v, c, by_state, u, steps, heads, rows, chunks, many,
        **constants, REVERSE=reverse, KEEP=to_keep.numel() > 0,
    )  # fmt: skip
    return u, c, states
