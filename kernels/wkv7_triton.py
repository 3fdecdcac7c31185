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

What it costs a head and token at N = 64, L = 32, bfloat16: forwards 5.0 KB of memory traffic (`_prepare` 1.4, `_scan` 1.9,
`_outputs` 1.7) and 85 thousand operations; backwards 14 KB (all that again, the same three in reverse, `_gradients` 6) and 240
thousand. Of all but `_scan` there are B H T / L programs, of 4 warps, 2 to 4 to a multiprocessor; `_scan` has B H N / 16 or
B H N / 32, of T / L steps, each of which is two products that wait for each other. Beside the results that takes, for each
head and token, 1.3 KB of memory while it runs forwards, 2.5 KB backwards.
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

# Tiles: (L, KEYS) or (L, VALUES) rows of one head, and (VALUES, KEYS) states; wider heads are done block by block. Of a
# chunk's rows only the first `count` exist, and of the columns N: the rest is read as 0, which adds nothing. The inputs are
# (B, T, H, N); what passes between kernels is float32: c, the running sum of the log decays, which starts anew in each chunk,
# W and u are (B H, T, N), states are (slots, B H, N, N). Factors of products are scaled around the middle of a chunk, so that
# none leaves the range of float32.


@triton.jit
def load(x, at, inside):
    """The values that exist, the others 0, in float32."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(x, at, inside, value):
    """Store the values that exist."""
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def present(first, columns, T, N: tl.constexpr, L: tl.constexpr):
    """Which values of the rows from `first` on exist."""
    return (tl.arange(0, L) < T - first)[:, None] & (columns < N)[None, :]


@triton.jit
def offsets(columns, stride, L: tl.constexpr):
    """Where L rows of these columns lie, from the first row on."""
    return tl.arange(0, L)[:, None] * stride + columns[None, :]


@triton.jit
def row_of(head, first, T, H, N: tl.constexpr):
    """Where a row of a head begins in (B, T, H, N)."""
    return (((head // H).to(tl.int64) * T + first) * H + head % H) * N


@triton.jit
def own_row_of(head, first, T, N: tl.constexpr):
    """And in (B H, T, N)."""
    return (head.to(tl.int64) * T + first) * N


@triton.jit
def state_of(slot, heads, head, values, keys, N: tl.constexpr):
    """Where the state of a head lies in (slots, B H, N, N), and which of its values exist."""
    at = (head.to(tl.int64) + slot * heads) * (N * N)
    return at + values[:, None] * N + keys[None, :], (values < N)[:, None] & (keys < N)[None, :]


@triton.jit
def _decays(c, count, keys, N: tl.constexpr, L: tl.constexpr):
    """c, c without the row's own decay, c at the end, and in the middle."""
    rows, in_keys = tl.arange(0, L), keys < N
    at, inside = offsets(keys, N, L), (rows < count)[:, None] & in_keys[None, :]
    end = tl.load(c + (count - 1) * N + keys, mask=in_keys, other=0.0)
    middle = tl.load(c + (tl.minimum(count, L // 2) - 1) * N + keys, mask=in_keys, other=0.0)
    return load(c, at, inside), load(c - N, at, inside & (rows > 0)[:, None]), end, middle


@triton.jit
def _sums(w, at, inside, L: tl.constexpr):
    """c, c without the row's own decay, and c in the middle, from w."""
    log_decay = tl.where(inside, _LOG_DECAY_MIN * tl.sigmoid(load(w, at, inside)), 0.0)
    until = tl.cumsum(log_decay, 0)
    middle = tl.sum(tl.where((tl.arange(0, L) == L // 2 - 1)[:, None], until, 0.0), 0)
    return until, until - log_decay, middle


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
    start, own_start = row_of(head, first, T, H, N), own_row_of(head, first, T, N)
    count = tl.minimum(T - first, L)
    c += own_start
    ab, ak = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        inside, at = present(first, keys, T, N, L), offsets(keys, H * N, L)
        if REVERSE:
            until, before, _, middle = _decays(c, count, keys, N, L)
            of_a, of_b = until, before
        else:
            until, before, middle = _sums(w + start, at, inside, L)
            of_a, of_b = before, until
        left = load(a + start, at, inside) * _from_middle(of_a, middle, not REVERSE)
        right = load(b + start, at, inside) * _from_middle(of_b, middle, REVERSE)
        ab = tl.dot(left, tl.trans(right), ab, input_precision=PRECISION)
        right = load(k + start, at, inside) * _from_middle(until, middle, REVERSE)
        ak = tl.dot(left, tl.trans(right), ak, input_precision=PRECISION)
    inverse = _inverse(tl.where(_pairs(L, REVERSE, False), ab, 0.0), L, PRECISION)
    ak = tl.where(_pairs(L, REVERSE, REVERSE), ak, 0.0)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside = present(first, values, T, N, L)
        v_tile = load(v + start, offsets(values, H * N, L), inside)
        own = tl.dot(inverse, tl.dot(ak, v_tile, input_precision=PRECISION), input_precision=PRECISION)
        store(u + own_start, offsets(values, N, L), inside, own)
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        inside, at, own_at = present(first, keys, T, N, L), offsets(keys, H * N, L), offsets(keys, N, L)
        if REVERSE:
            until, _, end, _ = _decays(c, count, keys, N, L)
            a_tile = load(a + start, at, inside) * tl.exp(end[None, :] - until)
        else:
            until, before, _ = _sums(w + start, at, inside, L)
            store(c, own_at, inside, until)
            a_tile = load(a + start, at, inside) * tl.exp(before)
        store(by_state + own_start, own_at, inside, tl.dot(inverse, a_tile, input_precision=PRECISION))


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
    at, own_at = offsets(keys, H * N, L), offsets(keys, N, L)
    v_at, u_at = offsets(values, H * N, L), offsets(values, N, L)
    square, in_square = state_of(segment, heads, head, values, keys, N)
    state = tl.load(starts + square, mask=in_square, other=0.0)
    last = tl.minimum(segment * many + many, chunks)
    for i in range(segment * many, last):
        chunk = chunks - 1 - i if REVERSE else i
        square, _ = state_of(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
        tl.store(states + square, state, mask=in_square)
        if KEEP:  # noqa: SIM102
            if chunk % stride == 0:
                square, _ = state_of(chunk // stride, heads, head, values, keys, N)
                tl.store(kept + square, state, mask=in_square)
        first = chunk * L
        start, own_start = row_of(head, first, T, H, N), own_row_of(head, first, T, N)
        inside, inside_v = present(first, keys, T, N, L), present(first, values, T, N, L)
        u_tile = load(u + own_start, u_at, inside_v)
        u_tile = tl.dot(load(by_state + own_start, own_at, inside), tl.trans(state), u_tile, input_precision=PRECISION)
        store(u + own_start, u_at, inside_v, u_tile)
        until, before, end, _ = _decays(c + own_start, tl.minimum(T - first, L), keys, N, L)
        k_tile = load(k + start, at, inside) * _to_border(until, end, REVERSE)
        b_tile = load(b + start, at, inside) * _to_border(before if REVERSE else until, end, REVERSE)
        v_tile = load(v + start, v_at, inside_v)
        state = tl.dot(tl.trans(v_tile), k_tile, state * tl.exp(end)[None, :], input_precision=PRECISION)
        state = tl.dot(tl.trans(u_tile), b_tile, state, input_precision=PRECISION)
    if last == chunks:
        square, _ = state_of(0 if REVERSE else chunks, heads, head, values, keys, N)
        tl.store(states + square, state, mask=in_square)


@triton.jit
def _outputs(
    states, r, k, b, v, u, c, y, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk. Backwards dv: r is k, k is r, b is a, v is dy."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    start, own_start = row_of(head, first, T, H, N), own_row_of(head, first, T, N)
    count = tl.minimum(T - first, L)
    c += own_start
    rk, rb = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        inside, at = present(first, keys, T, N, L), offsets(keys, H * N, L)
        until, before, _, middle = _decays(c, count, keys, N, L)
        left = load(r + start, at, inside) * _from_middle(until, middle, not REVERSE)
        right = load(k + start, at, inside) * _from_middle(until, middle, REVERSE)
        rk = tl.dot(left, tl.trans(right), rk, input_precision=PRECISION)
        right = load(b + start, at, inside) * _from_middle(before if REVERSE else until, middle, REVERSE)
        rb = tl.dot(left, tl.trans(right), rb, input_precision=PRECISION)
    rk = tl.where(_pairs(L, REVERSE, True), rk, 0.0)
    rb = tl.where(_pairs(L, REVERSE, not REVERSE), rb, 0.0)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside_v, at_v = present(first, values, T, N, L), offsets(values, H * N, L)
        out = tl.dot(rk, load(v + start, at_v, inside_v), input_precision=PRECISION)
        out = tl.dot(rb, load(u + own_start, offsets(values, N, L), inside_v), out, input_precision=PRECISION)
        for key in range(0, N, KEYS):
            keys = key + tl.arange(0, KEYS)
            until, _, end, _ = _decays(c, count, keys, N, L)
            r_tile = load(r + start, offsets(keys, H * N, L), present(first, keys, T, N, L))
            r_tile *= _to_border(until, end, not REVERSE)
            square, in_square = state_of(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
            state = tl.load(states + square, mask=in_square, other=0.0)
            out = tl.dot(r_tile, tl.trans(state), out, input_precision=PRECISION)
        store(y + start, at_v, inside_v, out)


@triton.jit
def _gradients(
    states, grads, r, a, k, b, dy, z, v, u, c, w, sums, dr, da, dw, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradients dr and da of one chunk. Backwards dk and db: `states` and `grads`, r and k, a and b, dy and v, z and u
    trade places.

    The gradient of a log decay follows from these four. At the chunk's borders it is the product of state and gradient, and
    from step to step it changes by what is written, k dk + b db, less what is read, r dr and a da, the latter before
    the decay. Of the sums from either border each step takes a share by its nearness: their errors are apart, and grow
    with the distance. Forwards stores its part of that in `sums`; backwards adds the other.
    """
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    start, own_start = row_of(head, first, T, H, N), own_row_of(head, first, T, N)
    count = tl.minimum(T - first, L)
    rk, rb = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    ak, ab = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside, at, own_at = present(first, values, T, N, L), offsets(values, H * N, L), offsets(values, N, L)
        dy_tile, z_tile = load(dy + start, at, inside), load(z + own_start, own_at, inside)
        v_tile, u_tile = tl.trans(load(v + start, at, inside)), tl.trans(load(u + own_start, own_at, inside))
        rk = tl.dot(dy_tile, v_tile, rk, input_precision=PRECISION)
        ak = tl.dot(z_tile, v_tile, ak, input_precision=PRECISION)
        rb = tl.dot(dy_tile, u_tile, rb, input_precision=PRECISION)
        ab = tl.dot(z_tile, u_tile, ab, input_precision=PRECISION)
    rk, ak = tl.where(_pairs(L, REVERSE, True), rk, 0.0), tl.where(_pairs(L, REVERSE, REVERSE), ak, 0.0)
    rb, ab = tl.where(_pairs(L, REVERSE, not REVERSE), rb, 0.0), tl.where(_pairs(L, REVERSE, False), ab, 0.0)
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        r_grad, a_grad = tl.zeros((L, KEYS), tl.float32), tl.zeros((L, KEYS), tl.float32)
        border = tl.zeros((KEYS,), tl.float32)
        for value in range(0, N, VALUES):
            values = value + tl.arange(0, VALUES)
            inside = present(first, values, T, N, L)
            square, in_square = state_of(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
            state = tl.load(states + square, mask=in_square, other=0.0)
            dy_tile = load(dy + start, offsets(values, H * N, L), inside)
            r_grad = tl.dot(dy_tile, state, r_grad, input_precision=PRECISION)
            z_tile = load(z + own_start, offsets(values, N, L), inside)
            a_grad = tl.dot(z_tile, state, a_grad, input_precision=PRECISION)
            border += tl.sum(tl.load(grads + square, mask=in_square, other=0.0) * state, 0)

        inside, at, own_at = present(first, keys, T, N, L), offsets(keys, H * N, L), offsets(keys, N, L)
        until, before, end, middle = _decays(c + own_start, count, keys, N, L)
        of_a, of_b = (until, before) if REVERSE else (before, until)
        k_tile = load(k + start, at, inside) * _from_middle(until, middle, REVERSE)
        r_pairs = tl.dot(rk, k_tile, input_precision=PRECISION)
        a_pairs = tl.dot(ak, k_tile, input_precision=PRECISION)
        b_tile = load(b + start, at, inside) * _from_middle(of_b, middle, REVERSE)
        r_pairs = tl.dot(rb, b_tile, r_pairs, input_precision=PRECISION)
        a_pairs = tl.dot(ab, b_tile, a_pairs, input_precision=PRECISION)
        r_grad = r_grad * _to_border(until, end, not REVERSE) + r_pairs * _from_middle(until, middle, not REVERSE)
        a_grad = a_grad * _to_border(of_a, end, not REVERSE) + a_pairs * _from_middle(of_a, middle, not REVERSE)
        store(dr + start, at, inside, r_grad)
        store(da + start, at, inside, a_grad)

        r_grad *= load(r + start, at, inside)
        a_grad *= load(a + start, at, inside)
        change = r_grad + a_grad
        nearness = ((tl.arange(0, L) + 0.5) / L)[:, None]
        shared = tl.cumsum(change, 0) - change - tl.sum(change, 0)[None, :] * nearness
        if REVERSE:
            dlog_decay = load(sums + own_start, own_at, inside) + shared + border[None, :] * nearness
            raw = load(w + start, at, inside)
            # sigmoid(-w) rather than 1 - sigmoid(w), which has no correct digit left at w = 17
            store(dw + start, at, inside, dlog_decay * _LOG_DECAY_MIN * tl.sigmoid(raw) * tl.sigmoid(-raw))
        else:
            store(sums + own_start, own_at, inside, border[None, :] * (1 - nearness) - shared - a_grad)


def kept(steps: int, state: Tensor) -> Tensor:
    """Memory for what `forward` keeps: the states before each `KEPT` steps."""
    batch, heads, size, _ = state.shape
    return state.new_empty((triton.cdiv(steps, KEPT), batch * heads, size, size), dtype=torch.float32)


def forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and what `backward` needs if `keep`."""
    constants, dtype = sizes(r.shape[-1], r.dtype), r.dtype
    r, w, k, v, a, b = (readable(x) for x in (r, w_raw, k, v, a, b))
    y, to_keep = torch.empty_like(r), kept(r.shape[1], state) if keep else state.new_empty(0)
    with torch.cuda.device(r.get_device()):
        u, c, states = _pass(a, b, k, v, w, state.float().contiguous(), to_keep, constants)
        each_chunk(_outputs, r, constants)(states, r, k, b, v, u, c, y, REVERSE=False)
    return y.to(dtype), states[-1].view(state.shape).to(state.dtype, copy=True), to_keep


def backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of r, w_raw, k, v, a, b and the first state."""
    constants, dtypes = sizes(r.shape[-1], r.dtype), [x.dtype for x in (r, w_raw, k, v, a, b)]
    r, w, k, v, a, b, dy = (readable(x) for x in (r, w_raw, k, v, a, b, dy))
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in (r, w, k, v, a, b))
    with torch.cuda.device(r.get_device()):
        u, c, states = _pass(a, b, k, v, w, kept, kept.new_empty(0), constants)
        end = dfinal.float().contiguous()
        z, c, grads = _pass(b, a, r, dy, c, end, kept.new_empty(0), constants, reverse=True)
        each_chunk(_outputs, r, constants)(grads, k, r, a, dy, z, c, dv, REVERSE=True)
        sums = torch.empty_like(c)
        start = each_chunk(_gradients, r, constants)
        start(states, grads, r, a, k, b, dy, z, v, u, c, w, sums, dr, da, dw, REVERSE=False)
        start(grads, states, k, b, r, a, v, u, dy, z, c, w, sums, dk, db, dw, REVERSE=True)
    dstate = grads[0].view(dfinal.shape).to(dfinal.dtype, copy=True)
    return *(x.to(dtype) for x, dtype in zip((dr, dw, dk, dv, da, db), dtypes, strict=True)), dstate


def sizes(size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of all kernels, for heads of `size` channels and r of `dtype`.

    In float32 products are exact, as the reference's are, and chunks are short: the exponents of 16 steps cost no digits.
    With 16 bits to an input, tensor cores round less than the inputs were, and longer chunks keep them busier.
    """
    exact, keys = dtype == torch.float32, max(16, triton.next_power_of_2(size))
    return {
        "N": size,
        "KEYS": min(32, keys),
        "VALUES": min(32, keys),
        "L": 16 if exact or keys > 128 else 32,
        "PRECISION": "ieee" if exact or torch.version.hip else "tf32",
    }


def scan_sizes(constants: dict[str, Any], rows: int) -> dict[str, Any]:
    """Those of `_scan` over `rows` heads, whose tile of states has all keys. Few heads are spread over more programs."""
    keys = max(16, triton.next_power_of_2(constants["N"]))
    values = 32 if keys <= 64 and rows * keys >= 32 * 256 else 16
    return constants | {
        "KEYS": keys,
        "VALUES": min(keys, values),
        "num_warps": 4 if keys <= 64 else 8,
        "num_stages": 2 if keys <= 64 else 1,
    }


def readable(x: Tensor) -> Tensor:
    """In a dtype that the kernels read, contiguous."""
    return (x if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.float()).contiguous()


def each_chunk(kernel: Any, x: Tensor, constants: dict[str, Any]) -> Callable[..., None]:
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
    """Make u, c, and the states at the borders of all chunks; backwards, where w is c, these are z, c and gradients.

    `starts` is the first state, from which all chunks follow, or those kept, of which each begins anew. `to_keep` is memory
    for those to keep, or empty.
    """
    batch, steps, heads, size = a.shape
    rows, chunks = batch * heads, triton.cdiv(steps, constants["L"])
    by_state, u = (a.new_empty((rows, steps, size), dtype=torch.float32) for _ in range(2))
    c = w if reverse else torch.empty_like(u)
    states = u.new_empty((chunks + 1, rows, size, size))
    each_chunk(_prepare, a, constants)(a, b, k, v, w, c, by_state, u, REVERSE=reverse)
    segments = starts.numel() // states[0].numel()
    many = KEPT // constants["L"] if segments > 1 else chunks
    constants = scan_sizes(constants, rows)
    _scan[(triton.cdiv(size, constants["VALUES"]) * rows * segments,)](
        starts, states, to_keep, k, b, v, c, by_state, u, steps, heads, rows, chunks, many,
        **constants, REVERSE=reverse, KEEP=to_keep.numel() > 0,
    )  # fmt: skip
    return u, c, states
