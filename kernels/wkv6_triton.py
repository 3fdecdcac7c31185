"""WKV-6 in Triton: chunks in parallel in time, on NVIDIA and AMD. The operator and its notation are in `kernels.wkv6`.

Rows t = 1..L of a chunk, S the state before it, S' the one after. A bar marks rows decayed to the border of the chunk where
the state comes from (r_), or goes to (k_); A_ts is r_t . k_s under the decays between, for s < t.

    y = (A + diag(r . u k)) v + r_ S^T
    S' = S diag(D) + v^T k_

The gradient of the state obeys the same equations backwards in time, where r and k, v and dy trade places, with dv for y. So
three kernels serve both directions: `_adds` makes what all chunks add to the state at once, `_scan` sums that up, and
`_outputs` makes y, or dv, of all chunks at once. `_gradients` makes dr or dk. The states before each `KEPT` steps are kept for
the backward, which makes those between again.

A decay may be 0, so that no quotient of products stands for the product in between, nor a difference of sums for the sum. So
each pair s < t is cut where it is first parted as the chunk is halved again and again: with blocks of 1, 2, 4, ... steps, s is
in a block and t in the next, and the decays between are those from s to the end of its block times those from the start of
t's block: sums of logarithms within one block, all of one sign.

What it costs a head and token at N = 64, L = 32, bfloat16: forwards 4 KB of memory traffic and 45 thousand operations,
backwards 11 KB and 170 thousand. Of all kernels but `_scan` there are B H T / L programs, of 4 warps; `_scan` has
B H N N / 512, of T / L steps, each of which is one multiplication and addition of what does not depend on the last.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.wkv7_triton import (
    KEPT,
    each_chunk,
    kept,
    load,
    offsets,
    own_row_of,
    present,
    readable,
    row_of,
    sizes,
    state_of,
    store,
)

__all__ = ["backward", "forward", "kept"]

SCAN_BLOCK = 512
"""Values of a state that one program of `_scan` follows, each by itself."""

_KEPT = tl.constexpr(KEPT)

# Tiles and layouts are those of `kernels.wkv7_triton`. `wholes`, (chunks, B H, N), are the decays D.


@triton.jit
def _logs(w, at, inside, count, stride, L: tl.constexpr, AFTER: tl.constexpr):
    """The log decays of the rows before these, or after: 0 for the chunk's first, or last."""
    rows = tl.arange(0, L)
    inside = inside & (rows < count - 1 if AFTER else rows > 0)[:, None]
    return tl.where(inside, -tl.exp(load(w + (stride if AFTER else -stride), at, inside)), 0.0)


@triton.jit
def _decays(logs, LEVEL: tl.constexpr, L: tl.constexpr, KEYS: tl.constexpr, AFTER: tl.constexpr):
    """The decays between each row and the start of its block of 2^LEVEL rows, or its end."""
    border: tl.constexpr = (1 << LEVEL) - 1 if AFTER else 0
    logs = tl.where((tl.arange(0, L) % (1 << LEVEL) == border)[:, None], 0.0, logs)
    logs = tl.cumsum(tl.reshape(logs, (L >> LEVEL, 1 << LEVEL, KEYS)), 1, reverse=AFTER)
    return tl.exp(tl.reshape(logs, (L, KEYS)))


@triton.jit
def _parted(LEVEL: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr):
    """Whether the column's step is in the block before that of the row's; or after it."""
    row, column = tl.arange(0, L)[:, None] >> LEVEL, tl.arange(0, L)[None, :] >> LEVEL
    return (row ^ 1 == column) & (row < column if REVERSE else row > column)


@triton.jit
def _adds(
    k, v, w, states, wholes, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the state, and forwards its D. Backwards, k is r and v is dy."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    start, count = row_of(head, first, T, H, N), tl.minimum(T - first, L)
    levels: tl.constexpr = 4 if L == 16 else 5 if L == 32 else 6
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        inside, at = present(first, keys, T, N, L), offsets(keys, H * N, L)
        logs = _logs(w + start, at, inside, count, H * N, L, not REVERSE)
        k_tile = load(k + start, at, inside) * _decays(logs, levels, L, KEYS, not REVERSE)
        if not REVERSE:
            logs = tl.where(inside, -tl.exp(load(w + start, at, inside)), 0.0)
            whole = (head.to(tl.int64) + chunk * heads) * N + keys
            tl.store(wholes + whole, tl.exp(tl.sum(logs, 0)), mask=keys < N)
        for value in range(0, N, VALUES):
            values = value + tl.arange(0, VALUES)
            v_tile = load(v + start, offsets(values, H * N, L), present(first, values, T, N, L))
            square, in_square = state_of(chunk if REVERSE else chunk + 1, heads, head, values, keys, N)
            store(states, square, in_square, tl.dot(tl.trans(v_tile), k_tile, input_precision=PRECISION))


@triton.jit
def _scan(
    starts, states, wholes, kept, heads, chunks, many,
    N: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Turns what `many` chunks add, one after another, into the states at their borders."""
    stride: tl.constexpr = _KEPT // L
    blocks: tl.constexpr = (N * N + BLOCK - 1) // BLOCK
    head, segment = tl.program_id(0) // blocks % heads, tl.program_id(0) // (blocks * heads)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < N * N
    head = head.to(tl.int64)
    state = load(starts + (head + segment * heads) * (N * N), at, inside)
    begin, last = segment * many, tl.minimum(segment * many + many, chunks)
    store(states + (head + (chunks - begin if REVERSE else begin) * heads) * (N * N), at, inside, state)
    # The state at the next segment's start is known: what the last chunk adds to it is not even read.
    for i in tl.range(begin, tl.where(last == chunks, last, last - 1), num_stages=4):
        chunk = chunks - 1 - i if REVERSE else i
        if KEEP:  # noqa: SIM102
            if chunk % stride == 0:
                store(kept + (head + chunk // stride * heads) * (N * N), at, inside, state)
        border = states + (head + (chunk if REVERSE else chunk + 1) * heads) * (N * N)
        state = state * load(wholes + (head + chunk * heads) * N, at % N, inside) + load(border, at, inside)
        store(border, at, inside, state)


@triton.jit
def _outputs(
    states, r, k, v, w, u, y, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk. Backwards dv: r is k, k is r, v is dy."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    start, count = row_of(head, first, T, H, N), tl.minimum(T - first, L)
    levels: tl.constexpr = 4 if L == 16 else 5 if L == 32 else 6
    scores, bonus = tl.zeros((L, L), tl.float32), tl.zeros((L,), tl.float32)
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        inside, at = present(first, keys, T, N, L), offsets(keys, H * N, L)
        r_tile, k_tile = load(r + start, at, inside), load(k + start, at, inside)
        bonus += tl.sum(r_tile * k_tile * load(u + head % H * N, keys, keys < N)[None, :], 1)
        of_r = _logs(w + start, at, inside, count, H * N, L, REVERSE)
        of_k = _logs(w + start, at, inside, count, H * N, L, not REVERSE)
        for level in tl.static_range(levels):
            left, right = r_tile, k_tile
            if level > 0:
                left = r_tile * _decays(of_r, level, L, KEYS, REVERSE)
                right = k_tile * _decays(of_k, level, L, KEYS, not REVERSE)
            products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
            scores = tl.where(_parted(level, L, REVERSE), scores + products, scores)
    scores = tl.where(tl.arange(0, L)[:, None] == tl.arange(0, L)[None, :], bonus[:, None], scores)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside_v, at_v = present(first, values, T, N, L), offsets(values, H * N, L)
        out = tl.dot(scores, load(v + start, at_v, inside_v), input_precision=PRECISION)
        for key in range(0, N, KEYS):
            keys = key + tl.arange(0, KEYS)
            inside, at = present(first, keys, T, N, L), offsets(keys, H * N, L)
            of_r = _logs(w + start, at, inside, count, H * N, L, REVERSE)
            r_tile = load(r + start, at, inside) * _decays(of_r, levels, L, KEYS, REVERSE)
            square, in_square = state_of(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
            out = tl.dot(r_tile, tl.trans(load(states, square, in_square)), out, input_precision=PRECISION)
        store(y + start, at_v, inside_v, out)


@triton.jit
def _gradients(
    states, grads, r, k, dy, v, w, u, sums, dr, du, dw, T, H, heads, chunks,
    N: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient dr of one chunk, and its part of du. Backwards dk and dw: `states` and `grads`, r and k, dy and v trade
    places.

    The gradient of a log decay is the sum over all that passes it: pairs of a step that writes before and one that reads
    after, and the state at either side. Every term has the decay as a factor, so that none is the small difference of large
    ones. Of the readers it is stored in `sums`; backwards adds that of the writers, and of the states.
    """
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk * L
    start, count = row_of(head, first, T, H, N), tl.minimum(T - first, L)
    own_start = own_row_of(head, first, T, N)
    levels: tl.constexpr = 4 if L == 16 else 5 if L == 32 else 6
    row, column = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    dscores = tl.zeros((L, L), tl.float32)
    for value in range(0, N, VALUES):
        values = value + tl.arange(0, VALUES)
        inside, at = present(first, values, T, N, L), offsets(values, H * N, L)
        v_tile = tl.trans(load(v + start, at, inside))
        dscores = tl.dot(load(dy + start, at, inside), v_tile, dscores, input_precision=PRECISION)
    dbonus = tl.sum(tl.where(row == column, dscores, 0.0), 1)[:, None]
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)
        inside, at = present(first, keys, T, N, L), offsets(keys, H * N, L)
        of_r = _logs(w + start, at, inside, count, H * N, L, REVERSE)
        of_k = _logs(w + start, at, inside, count, H * N, L, not REVERSE)
        r_tile, k_tile = load(r + start, at, inside), load(k + start, at, inside)
        r_grad = load(u + head % H * N, keys, keys < N)[None, :] * k_tile * dbonus

        read, by_states = tl.zeros((L, KEYS), tl.float32), tl.zeros((KEYS,), tl.float32)
        for value in range(0, N, VALUES):
            values = value + tl.arange(0, VALUES)
            square, in_square = state_of(chunk + 1 if REVERSE else chunk, heads, head, values, keys, N)
            state = load(states, square, in_square)
            dy_tile = load(dy + start, offsets(values, H * N, L), present(first, values, T, N, L))
            read = tl.dot(dy_tile, state, read, input_precision=PRECISION)
            if REVERSE:
                square, _ = state_of(chunk, heads, head, values, keys, N)
                by_states += tl.sum(load(grads, square, in_square) * state, 0)
        read *= _decays(of_r, levels, L, KEYS, REVERSE)
        r_grad += read
        behind = tl.where(row > column if REVERSE else row < column, 1.0, 0.0)
        dlog_decay = tl.dot(behind, read * r_tile, input_precision=PRECISION)
        for level in tl.static_range(levels):
            pairs = tl.where(_parted(level, L, REVERSE), dscores, 0.0)
            right = k_tile
            if level > 0:
                right = k_tile * _decays(of_k, level, L, KEYS, not REVERSE)
            read = tl.dot(pairs, right, input_precision=PRECISION)
            if level > 0:
                read *= _decays(of_r, level, L, KEYS, REVERSE)
                near = tl.where(row >> level == column >> level, behind, 0.0)
                dlog_decay = tl.dot(near, read * r_tile, dlog_decay, input_precision=PRECISION)
            r_grad += read
        store(dr + start, at, inside, r_grad)
        own_at = offsets(keys, N, L)
        if REVERSE:
            rate = tl.exp(load(w + start, at, inside))
            whole = tl.exp(-tl.sum(tl.where(inside, rate, 0.0), 0))
            dlog_decay += load(sums + own_start, own_at, inside) + (by_states * whole)[None, :]
            store(dw + start, at, inside, -rate * dlog_decay)
        else:
            store(sums + own_start, own_at, inside, dlog_decay)
            part = (head.to(tl.int64) + chunk * heads) * N + keys
            tl.store(du + part, tl.sum(r_tile * k_tile * dbonus, 0), mask=keys < N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and what `backward` needs if `keep`."""
    constants, dtype = sizes(r.shape[-1], r.dtype), r.dtype
    r, k, v, w, u = (readable(x) for x in (r, k, v, w_raw, u))
    y, to_keep = torch.empty_like(r), kept(r.shape[1], state) if keep else state.new_empty(0)
    with torch.cuda.device(r.get_device()):
        states = _pass(k, v, w, _wholes(r, constants), state.float().contiguous(), to_keep, constants)
        each_chunk(_outputs, r, constants)(states, r, k, v, w, u, y, REVERSE=False)
    return y.to(dtype), states[-1].view(state.shape).to(state.dtype, copy=True), to_keep


def backward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of r, k, v, w_raw, u and the first state."""
    constants, dtypes = sizes(r.shape[-1], r.dtype), [x.dtype for x in (r, k, v, w_raw, u)]
    r, k, v, w, u, dy = (readable(x) for x in (r, k, v, w_raw, u, dy))
    dr, dk, dv, dw = (torch.empty_like(x) for x in (r, k, v, w))
    batch, steps, heads, size = r.shape
    with torch.cuda.device(r.get_device()):
        wholes = _wholes(r, constants)
        states = _pass(k, v, w, wholes, kept, kept.new_empty(0), constants)
        grads = _pass(r, dy, w, wholes, dfinal.float().contiguous(), kept.new_empty(0), constants, reverse=True)
        each_chunk(_outputs, r, constants)(grads, k, r, dy, w, u, dv, REVERSE=True)
        sums, du = kept.new_empty((batch * heads, steps, size)), torch.empty_like(wholes)
        start = each_chunk(_gradients, r, constants)
        start(states, grads, r, k, dy, v, w, u, sums, dr, du, dw, REVERSE=False)
        start(grads, states, k, r, v, dy, w, u, sums, dk, du, dw, REVERSE=True)
    dstate = grads[0].view(dfinal.shape).to(dfinal.dtype, copy=True)
    results = (dr, dk, dv, dw, du.view(-1, heads, size).sum(0))
    return *(x.to(dtype) for x, dtype in zip(results, dtypes, strict=True)), dstate


def _pass(
    k: Tensor, v: Tensor, w: Tensor, wholes: Tensor, starts: Tensor, to_keep: Tensor, constants: dict[str, Any],
    *, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """The states at the borders of all chunks, and into `wholes` what they decay by; or the gradients, from that.

    `starts` is the first state, from which all chunks follow, or those kept, of which each begins anew. `to_keep` is memory
    for those to keep, or empty.
    """
    batch, _, heads, size = k.shape
    rows, chunks = batch * heads, len(wholes)
    states = wholes.new_empty((chunks + 1, rows, size, size))
    each_chunk(_adds, k, constants)(k, v, w, states, wholes, REVERSE=reverse)
    segments = starts.numel() // states[0].numel()
    many = KEPT // constants["L"] if segments > 1 else chunks
    _scan[(triton.cdiv(size * size, SCAN_BLOCK) * rows * segments,)](
        starts, states, wholes, to_keep, rows, chunks, many,
        N=size, L=constants["L"], BLOCK=SCAN_BLOCK, REVERSE=reverse, KEEP=to_keep.numel() > 0,
    )  # fmt: skip
    return states


def _wholes(x: Tensor, constants: dict[str, Any]) -> Tensor:
    batch, steps, heads, size = x.shape
    return x.new_empty((triton.cdiv(steps, constants["L"]), batch * heads, size), dtype=torch.float32)
