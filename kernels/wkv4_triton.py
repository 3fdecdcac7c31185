"""WKV-4 in Triton: chunks in parallel in time, on NVIDIA and AMD. The operator and its notation are in `kernels.wkv4`.

Forwards the sums are x_{t+1} = e^l x_t + e^{k_t} (v_t, 1). Backwards, from the end, their gradients are such sums too, of
e^{-m_t} (g_t, -g_t y_t), where e^m is the unit of the weight that y is divided by, and g is dy by that weight in its unit. Both
are held as e^p (a, b), and made in three short scans: `_sums` over the steps of every chunk from nothing, all chunks at once,
which gives what a chunk adds; `_scan` over the chunks, which gives the sums before each; and over the steps again from those,
by `_outputs` and `_gradients`. The sums before each chunk are kept for the backward, which first makes those before each step.

What it costs a channel and step in bfloat16: forwards 10 bytes of memory traffic and 9 exponentials, backwards 60 bytes and 20.
There are B T / CHUNK times C / CHANNELS programs, of one warp and `CHUNK` steps, and for `_scan` B C / CHANNELS, of T / CHUNK.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.wkv7_triton import load, readable, store

CHUNK = 64
"""Steps done one after another, in all chunks at once."""

CHANNELS = 64
"""Channels of one program."""

_NOTHING = tl.constexpr(-1e38)

# k, v, dy are (B, T, C), w and u (C,). Sums are rows of a, b and p, (..., 3, C): of each chunk (chunks, B, 3, C), of each
# step (B, T + 1, 3, C).


@triton.jit
def _load_sums(x, at, C, inside):
    return load(x, at, inside), load(x + C, at, inside), load(x + 2 * C, at, inside)


@triton.jit
def _store_sums(x, at, C, inside, a, b, p):
    store(x, at, inside, a)
    store(x + C, at, inside, b)
    store(x + 2 * C, at, inside, p)


@triton.jit
def _join(log_decay, a, b, p, x, y, e):
    """The sum of e^p (a, b), decayed, and e^e (x, y)."""
    largest = tl.maximum(log_decay + p, e)
    keep, add = tl.exp(log_decay + (p - largest)), tl.exp(e - largest)  # in this order it undoes the rounding of p
    return keep * a + add * x, keep * b + add * y, largest


@triton.jit
def _average(k, v, u, a, b, p):
    """The output y, the unit of the weight that it is divided by, the current value's share of that, and the whole weight."""
    largest = tl.maximum(p, u + k)
    before, here = tl.exp(p - largest), tl.exp(u + k - largest)
    weight = before * b + here
    return (before * a + here * v) / weight, largest, here, weight


@triton.jit
def _place(chunks, C, CHANNELS: tl.constexpr):
    """Which batch row, chunk and channels a program does, and which of the channels exist."""
    blocks = tl.cdiv(C, CHANNELS)
    at = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return tl.program_id(0) // blocks // chunks, tl.program_id(0) // blocks % chunks, at, at < C


@triton.jit
def _sums(
    k, v, w, u, steps, dy, sums, B, T, C, chunks, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, REVERSE: tl.constexpr
):
    """What one chunk adds, with nothing before it. Backwards, with `steps`, to the gradients."""
    batch, chunk, at, inside = _place(chunks, C, CHANNELS)
    first = chunk * CHUNK
    count = tl.minimum(T - first, CHUNK)
    row = (batch.to(tl.int64) * T + first) * C
    log_decay, bonus = -tl.exp(load(w, at, inside)), load(u, at, inside)
    a, b = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    p = tl.full((CHANNELS,), _NOTHING, tl.float32)
    for i in tl.range(count, num_stages=4):
        t = count - 1 - i if REVERSE else i
        key, value = load(k + row + t * C, at, inside), load(v + row + t * C, at, inside)
        if REVERSE:
            here = (batch.to(tl.int64) * (T + 1) + first + t) * (3 * C)
            y, e, _, weight = _average(key, value, bonus, *_load_sums(steps + here, at, C, inside))
            g = load(dy + row + t * C, at, inside) / weight
            a, b, p = _join(log_decay, a, b, p, g, -g * y, -e)
        else:
            a, b, p = _join(log_decay, a, b, p, value, 1.0, key)
    _store_sums(sums + (chunk.to(tl.int64) * B + batch) * (3 * C), at, C, inside, a, b, p)


@triton.jit
def _scan(
    start, w, steps, kept, sums, borders, dstate, B, T, C, chunks,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The sums before each chunk. Backwards, the gradients after each, and those of the first state."""
    batch, _, at, inside = _place(1, C, CHANNELS)
    log_decay = -tl.exp(load(w, at, inside))
    a, b, p = _load_sums(start + batch * (3 * C), at, C, inside)
    if REVERSE:
        p = -load(steps + ((batch.to(tl.int64) + 1) * (T + 1) * 3 - 1) * C, at, inside)
    for i in tl.range(chunks, num_stages=4):
        chunk = chunks - 1 - i if REVERSE else i
        here = (chunk * B + batch.to(tl.int64)) * (3 * C)
        _store_sums(borders + here, at, C, inside, a, b, p)
        x, y, e = _load_sums(sums + here, at, C, inside)
        a, b, p = _join(log_decay * tl.minimum(T - chunk * CHUNK, CHUNK), a, b, p, x, y, e)
    if REVERSE:
        unit = tl.exp(p + load(kept + (batch * 3 + 2) * C, at, inside))
        _store_sums(dstate + batch * (3 * C), at, C, inside, a * unit, b * unit, tl.zeros((CHANNELS,), tl.float32))


@triton.jit
def _outputs(
    kept, k, v, w, u, y, steps, final, B, T, C, chunks,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr, REPLAY: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, and the last state. REPLAY: instead the sums before each step, and the last."""
    batch, chunk, at, inside = _place(chunks, C, CHANNELS)
    first = chunk * CHUNK
    count = tl.minimum(T - first, CHUNK)
    row, here = (batch.to(tl.int64) * T + first) * C, (batch.to(tl.int64) * (T + 1) + first) * (3 * C)
    log_decay, bonus = -tl.exp(load(w, at, inside)), load(u, at, inside)
    a, b, p = _load_sums(kept + (chunk.to(tl.int64) * B + batch) * (3 * C), at, C, inside)
    for t in tl.range(count, num_stages=4):
        key, value = load(k + row + t * C, at, inside), load(v + row + t * C, at, inside)
        if REPLAY:
            _store_sums(steps + here + t * (3 * C), at, C, inside, a, b, p)
        else:
            out, _, _, _ = _average(key, value, bonus, a, b, p)
            store(y + row + t * C, at, inside, out)
        a, b, p = _join(log_decay, a, b, p, value, 1.0, key)
    if chunk == chunks - 1:
        if REPLAY:
            _store_sums(steps + here + count * (3 * C), at, C, inside, a, b, p)
        else:
            _store_sums(final + batch * (3 * C), at, C, inside, a, b, p)


@triton.jit
def _gradients(
    after, k, v, w, u, steps, dy, dk, dv, parts, B, T, C, chunks, CHUNK: tl.constexpr, CHANNELS: tl.constexpr
):
    """The gradients dk and dv of one chunk, and its part of those of the log decay and of u."""
    batch, chunk, at, inside = _place(chunks, C, CHANNELS)
    first = chunk * CHUNK
    count = tl.minimum(T - first, CHUNK)
    row, here = (batch.to(tl.int64) * T + first) * C, (batch.to(tl.int64) * (T + 1) + first) * (3 * C)
    log_decay, bonus = -tl.exp(load(w, at, inside)), load(u, at, inside)
    border = chunk.to(tl.int64) * B + batch
    da, db, q = _load_sums(after + border * (3 * C), at, C, inside)
    dlog_decay, du = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for i in tl.range(count, num_stages=4):
        t = count - 1 - i
        key, value = load(k + row + t * C, at, inside), load(v + row + t * C, at, inside)
        a, b, p = _load_sums(steps + here + t * (3 * C), at, C, inside)
        y, largest, share, weight = _average(key, value, bonus, a, b, p)
        g = load(dy + row + t * C, at, inside) / weight
        by_state, by_y = tl.exp(key + q), g * share
        more = by_y * (value - y)
        store(dk + row + t * C, at, inside, by_state * (da * value + db) + more)
        store(dv + row + t * C, at, inside, by_state * da + by_y)
        du += more
        dlog_decay += tl.exp(log_decay + p + q) * (da * a + db * b)
        da, db, q = _join(log_decay, da, db, q, g, -g * y, -largest)
    store(parts + border * (2 * C), at, inside, dlog_decay * log_decay)
    store(parts + border * (2 * C) + C, at, inside, du)


def kept(steps: int, state: Tensor) -> Tensor:
    """Memory for what `forward` keeps: the sums before each chunk."""
    return state.new_empty((triton.cdiv(steps, CHUNK), *state.shape), dtype=torch.float32)


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and what `backward` needs if `keep`."""
    dtype = k.dtype
    k, v, w, u = (readable(x) for x in (k, v, w, u))
    start, before = state.float().contiguous(), kept(k.shape[1], state)
    y, final, sums = torch.empty_like(k), torch.empty_like(start), torch.empty_like(before)
    with torch.cuda.device(k.get_device()):
        _start(_sums, k, True, k, v, w, u, None, None, sums, REVERSE=False)
        _start(_scan, k, False, start, w, None, None, sums, before, None, REVERSE=False)
        _start(_outputs, k, True, before, k, v, w, u, y, None, final, REPLAY=False)
    return y.to(dtype), final.to(state.dtype), before if keep else state.new_empty(0)


def backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of k, v, w, u and the first state."""
    dtypes = [x.dtype for x in (k, v, w, u, dfinal)]
    k, v, w, u, dy = (readable(x) for x in (k, v, w, u, dy))
    batch, length, channels = k.shape
    end, steps = dfinal.float().contiguous(), kept.new_empty((batch, length + 1, 3, channels))
    dk, dv, dstate, sums, after = (torch.empty_like(x) for x in (k, v, end, kept, kept))
    parts = kept.new_empty((len(kept) * batch, 2, channels))
    with torch.cuda.device(k.get_device()):
        _start(_outputs, k, True, kept, k, v, w, u, None, steps, None, REPLAY=True)
        _start(_sums, k, True, k, v, w, u, steps, dy, sums, REVERSE=True)
        _start(_scan, k, False, end, w, steps, kept, sums, after, dstate, REVERSE=True)
        _start(_gradients, k, True, after, k, v, w, u, steps, dy, dk, dv, parts)
    dw, du = parts[:, 0].sum(0), parts[:, 1].sum(0)
    return tuple(x.to(dtype) for x, dtype in zip((dk, dv, dw, du, dstate), dtypes, strict=True))


def _start(kernel: triton.JITFunction, k: Tensor, each_chunk: bool, *tensors: Tensor | None, **flags: bool) -> None:
    """Start programs of a kernel for all channels of k and batch rows, and for each chunk or all chunks together."""
    batch, steps, channels = k.shape
    chunks = triton.cdiv(steps, CHUNK)
    programs = triton.cdiv(channels, CHANNELS) * batch * (chunks if each_chunk else 1)
    kernel[(programs,)](*tensors, batch, steps, channels, chunks, CHUNK=CHUNK, CHANNELS=CHANNELS, **flags, num_warps=1)
