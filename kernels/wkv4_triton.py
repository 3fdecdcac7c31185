"""WKV-4 in Triton, on NVIDIA and AMD. The operator and its notation are in `kernels.wkv4`.

The sums e^p (a, b) obey x_{t+1} = e^l x_t + e^{k_t} (v_t, 1), so chunks of time run side by side: `_summarize` gives what each
adds to nothing, `_pass` takes the state through the chunks, one step each, and `_average` gives y from the state before
each. The gradients of the sums obey such an equation too, backwards: `_summarize_gradient`, `_pass` and `_gradients`. A program
has one chunk of a block of channels, or all chunks of one in `_pass`.

A channel and token costs, in bfloat16, 10 bytes of memory traffic forwards (k and v twice, y) and 44 backwards, of which 24 are
the states within the chunks, that `_summarize_gradient` leaves to `_gradients`.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
"""Steps from one kept state to the next: those of a program."""

_CHANNELS = 128
"""Of a program: one for each thread of four warps."""

_NOTHING = tl.constexpr(-1e38)

# In memory (a, b, p) are rows of C one after the other, as in the state (B, 3, C).


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_sums(x, at, C, inside):
    return _load(x, at, inside), _load(x, at + C, inside), _load(x, at + 2 * C, inside)


@triton.jit
def _store_sums(x, at, C, inside, a, b, p):
    tl.store(x + at, a, mask=inside)
    tl.store(x + at + C, b, mask=inside)
    tl.store(x + at + 2 * C, p, mask=inside)


@triton.jit
def _add(a, b, p, log_decay, more_a, more_b, more_p):
    """The sums a step later: decayed, and e^more_p (more_a, more_b) added."""
    after = tl.maximum(log_decay + p, more_p)
    keep = tl.exp(log_decay + (p - after))  # in this order it undoes the rounding of p
    add = tl.exp(more_p - after)
    return keep * a + add * more_a, keep * b + add * more_b, after


@triton.jit
def _mean(a, b, p, u, k, v):
    """y; the exponent of its weights; the weight of the step's own value, and of all."""
    now = u + k
    largest = tl.maximum(p, now)
    before = tl.exp(p - largest)
    own = tl.exp(now - largest)
    weight = before * b + own
    return (before * a + own * v) / weight, largest, own, weight


@triton.jit
def _summarize(k, v, w, added, T, C, L: tl.constexpr, WIDTH: tl.constexpr):
    """What a chunk adds to the sums, (B, chunks, 3, C)."""
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < C
    log_decay = -tl.exp(_load(w, channel, inside))
    a = tl.zeros((WIDTH,), tl.float32)
    b = tl.zeros((WIDTH,), tl.float32)
    p = tl.full((WIDTH,), _NOTHING, tl.float32)
    first = chunk * L
    for t in range(first, tl.minimum(first + L, T)):
        at = (row * T + t) * C + channel
        a, b, p = _add(a, b, p, log_decay, _load(v, at, inside), 1.0, _load(k, at, inside))
    _store_sums(added, (row * tl.num_programs(0) + chunk) * 3 * C + channel, C, inside, a, b, p)


@triton.jit
def _pass(w, first, added, passed, last, T, C, chunks, BACK: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr):
    """The sums before each chunk in the order of passing, (B, chunks, 3, C), and after all, (B, 3, C), from `first`."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < C
    log_decay = -tl.exp(_load(w, channel, inside))
    a, b, p = _load_sums(first, row * 3 * C + channel, C, inside)
    for i in range(chunks):
        chunk = chunks - 1 - i if BACK else i
        at = (row * chunks + chunk) * 3 * C + channel
        _store_sums(passed, at, C, inside, a, b, p)
        steps = tl.minimum(L, T - chunk * L)
        more_a, more_b, more_p = _load_sums(added, at, C, inside)
        a, b, p = _add(a, b, p, log_decay * steps, more_a, more_b, more_p)
    _store_sums(last, row * 3 * C + channel, C, inside, a, b, p)


@triton.jit
def _average(k, v, w, u, before, y, T, C, L: tl.constexpr, WIDTH: tl.constexpr):
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < C
    log_decay, bonus = -tl.exp(_load(w, channel, inside)), _load(u, channel, inside)
    a, b, p = _load_sums(before, (row * tl.num_programs(0) + chunk) * 3 * C + channel, C, inside)
    first = chunk * L
    for t in range(first, tl.minimum(first + L, T)):
        at = (row * T + t) * C + channel
        key, value = _load(k, at, inside), _load(v, at, inside)
        mean, _, _, _ = _mean(a, b, p, bonus, key, value)
        tl.store(y + at, mean.to(y.dtype.element_ty), mask=inside)
        a, b, p = _add(a, b, p, log_decay, value, 1.0, key)


@triton.jit
def _summarize_gradient(k, v, w, u, dy, before, states, added, T, C, L: tl.constexpr, WIDTH: tl.constexpr):
    """The state before each step, (B, T, 3, C), and what a chunk adds to the gradients of the sums."""
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < C
    log_decay, bonus = -tl.exp(_load(w, channel, inside)), _load(u, channel, inside)
    chunk_at = (row * tl.num_programs(0) + chunk) * 3 * C + channel
    a, b, p = _load_sums(before, chunk_at, C, inside)
    first = chunk * L
    end = tl.minimum(first + L, T)
    for t in range(first, end):
        at = row * T + t
        _store_sums(states, at * 3 * C + channel, C, inside, a, b, p)
        key, value = _load(k, at * C + channel, inside), _load(v, at * C + channel, inside)
        a, b, p = _add(a, b, p, log_decay, value, 1.0, key)
    da = tl.zeros((WIDTH,), tl.float32)
    db = tl.zeros((WIDTH,), tl.float32)
    q = tl.full((WIDTH,), _NOTHING, tl.float32)
    for i in range(end - first):
        at = row * T + end - 1 - i
        a, b, p = _load_sums(states, at * 3 * C + channel, C, inside)
        key, value = _load(k, at * C + channel, inside), _load(v, at * C + channel, inside)
        mean, largest, _, weight = _mean(a, b, p, bonus, key, value)
        g = _load(dy, at * C + channel, inside) / weight
        da, db, q = _add(da, db, q, log_decay, g, -g * mean, -largest)
    _store_sums(added, chunk_at, C, inside, da, db, q)


@triton.jit
def _gradients(
    k, v, w, u, dy, states, after, dk, dv, dw, du, T, C, L: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """dk, dv, and each chunk's share of dw and du, (B, chunks, C)."""
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < C
    log_decay, bonus = -tl.exp(_load(w, channel, inside)), _load(u, channel, inside)
    chunk_at = row * tl.num_programs(0) + chunk
    da, db, q = _load_sums(after, chunk_at * 3 * C + channel, C, inside)
    of_decay = tl.zeros((WIDTH,), tl.float32)
    of_bonus = tl.zeros((WIDTH,), tl.float32)
    first = chunk * L
    end = tl.minimum(first + L, T)
    for i in range(end - first):
        at = row * T + end - 1 - i
        a, b, p = _load_sums(states, at * 3 * C + channel, C, inside)
        at = at * C + channel
        key, value = _load(k, at, inside), _load(v, at, inside)
        mean, largest, own, weight = _mean(a, b, p, bonus, key, value)
        g = _load(dy, at, inside) / weight
        through_state = tl.exp(key + q)
        of_now = g * own * (value - mean)
        tl.store(dk + at, (through_state * (da * value + db) + of_now).to(dk.dtype.element_ty), mask=inside)
        tl.store(dv + at, (through_state * da + g * own).to(dv.dtype.element_ty), mask=inside)
        of_bonus += of_now
        of_decay += tl.exp(log_decay + (p + q)) * (da * a + db * b)
        da, db, q = _add(da, db, q, log_decay, g, -g * mean, -largest)
    tl.store(dw + chunk_at * C + channel, of_decay * log_decay, mask=inside)
    tl.store(du + chunk_at * C + channel, of_bonus, mask=inside)


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each chunk, and the last p."""
    batch, _, channels = state.shape
    return state.new_empty(batch * (-(-steps // CHUNK) * 3 + 1) * channels)


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv4`."""
    (k_, v_), w, u, state = _readable(k, v), w.contiguous(), u.contiguous(), state.contiguous()
    batch, steps, channels = k.shape
    chunks, blocks = triton.cdiv(steps, CHUNK), triton.cdiv(channels, _CHANNELS)
    left = kept(steps, state)
    before, last_p = left[: -batch * channels].view(batch, chunks, 3, channels), left[-batch * channels :]
    added, final, y = torch.empty_like(before), torch.empty_like(state), torch.empty_like(k_)
    sizes = {"T": steps, "C": channels, "L": CHUNK, "WIDTH": _CHANNELS}
    with torch.cuda.device(k.get_device()):
        _summarize[(chunks, blocks, batch)](k_, v_, w, added, **sizes)
        _pass[(blocks, batch)](w, state, added, before, final, chunks=chunks, BACK=False, **sizes)
        _average[(chunks, blocks, batch)](k_, v_, w, u, before, y, **sizes)
    last_p.copy_(final[:, 2].reshape(-1))
    return y.to(k.dtype), final, left if keep else state.new_empty(0)


def backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, left: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv4`. The states within a chunk are made again, not kept."""
    k_, v_ = _readable(k, v)
    w_, u_ = w.contiguous(), u.contiguous()
    batch, steps, channels = k.shape
    chunks, blocks = triton.cdiv(steps, CHUNK), triton.cdiv(channels, _CHANNELS)
    before, last_p = left[: -batch * channels].view(batch, chunks, 3, channels), left[-batch * channels :]
    dy, dk, dv = dy.to(k_.dtype).contiguous(), torch.empty_like(k_), torch.empty_like(v_)
    entering = dfinal.contiguous().clone()
    entering[:, 2] = -last_p.view(batch, channels)
    states = left.new_empty((batch, steps, 3, channels))
    added, after, leaving = torch.empty_like(before), torch.empty_like(before), torch.empty_like(entering)
    shares = left.new_empty((2, batch * chunks, channels))
    sizes = {"T": steps, "C": channels, "L": CHUNK, "WIDTH": _CHANNELS}
    with torch.cuda.device(k.get_device()):
        _summarize_gradient[(chunks, blocks, batch)](k_, v_, w_, u_, dy, before, states, added, **sizes)
        _pass[(blocks, batch)](w_, entering, added, after, leaving, chunks=chunks, BACK=True, **sizes)
        _gradients[(chunks, blocks, batch)](k_, v_, w_, u_, dy, states, after, dk, dv, shares[0], shares[1], **sizes)
    dw, du = shares.sum(1)
    dstate = torch.exp(leaving[:, 2:] + before[:, 0, 2:]) * leaving
    dstate[:, 2] = 0
    return dk.to(k.dtype), dv.to(v.dtype), dw.to(w.dtype, copy=True), du.to(u.dtype, copy=True), dstate


def _readable(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of one dtype, which the kernels read and write: bfloat16 if both are, else float32."""
    dtype = torch.bfloat16 if k.dtype == v.dtype == torch.bfloat16 else torch.float32
    return k.to(dtype).contiguous(), v.to(dtype).contiguous()
