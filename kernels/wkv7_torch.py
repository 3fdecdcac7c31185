"""WKV-7 in chunks, by torch's matrix products. The operator and its notation are in `kernels.wkv7`.

The chunked form is the WY representation of the products of I - kappa kappa', as for DeltaNet: Yang et al. 2024,
arXiv:2406.06484.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.wkv7 import LOG_DECAY_MIN

CHUNK = 16
"""Steps that become matrix products together. Within a chunk the decays span at most e^(0.61 * 16 / 2) each way from
the middle. Of 16, 32 and 64, 16 is the most accurate (its error is that of the step-by-step form) and no slower on a CPU."""

# Everything inside a chunk is matrix products over all chunks at once; only the state passes from
# chunk to chunk, as S' = S (diag(e^{c_L}) + P) + Q. Rows t = 1..L of a chunk; c_t is the sum of log decays up to and with
# t, ce_t without t. Factors are scaled around the middle row m, so that none leaves the range of float32.


class _Chunks(NamedTuple):
    """What both directions need of every chunk. (C, L, N) unless said otherwise, C = chunks * B * H."""

    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    sigmoid: Tensor
    """sigmoid(w_raw)"""
    later: Tensor
    """e^{c - m}: what r is scaled by"""
    later_a: Tensor
    """e^{ce - m}: what a is scaled by"""
    earlier: Tensor
    """e^{m - c}: what k and b are scaled by"""
    from_start: Tensor
    """e^m, (C, 1, N): turns a scale from the middle into one from the chunk's start"""
    to_end: Tensor
    """e^{c_L - m}, (C, 1, N): turns it into one to the chunk's end"""
    ab: Tensor
    """(C, L, L), strictly lower: a_t . b_s under the decays between, as are ak; rb and rk include s = t"""
    ak: Tensor
    rb: Tensor
    rk: Tensor
    inverse: Tensor
    """(I - ab)^{-1}, (C, L, L)"""


def _split(x: Tensor, length: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) -> (chunks, B * H, L, N), T filled up with steps that change nothing."""
    batch, steps, heads, size = x.shape
    missing = -steps % length
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, missing), value=fill)
    return x.view(batch, -1, length, heads, size).permute(1, 0, 3, 2, 4).reshape(-1, batch * heads, length, size)


def _join(x: Tensor, like: Tensor) -> Tensor:
    """(chunks, B * H, L, N) -> the shape and dtype of `like`, (B, T, H, N)."""
    batch, steps, heads, size = like.shape
    chunks, _, length, _ = x.shape
    x = x.view(chunks, batch, heads, length, size).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, size)
    return x[:, :steps].to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def _length(steps: int) -> int:
    return min(CHUNK, 1 << (steps - 1).bit_length())


def _chunks(r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> _Chunks:
    length = _length(r.shape[1])
    r, k, v, a, b = (_split(x, length, dtype) for x in (r, k, v, a, b))
    sigmoid = torch.sigmoid(_split(w_raw, length, dtype, fill=-torch.inf))  # decay 1 in the steps filled in
    log_decay = LOG_DECAY_MIN * sigmoid
    with_t = log_decay.cumsum(-2)
    middle = with_t[..., max(length // 2 - 1, 0), None, :]
    later = torch.exp(with_t - middle)
    later_a = torch.exp(with_t - log_decay - middle)
    earlier = torch.exp(middle - with_t)
    products = torch.cat((a * later_a, r * later), -2) @ torch.cat((b * earlier, k * earlier), -2).mT
    before = torch.ones(length, length, dtype=torch.bool, device=r.device).tril(-1)
    until = torch.ones_like(before).tril()
    ab, ak, rb, rk = (
        products[..., rows, columns].masked_fill(~mask, 0)
        for rows, mask in ((slice(length), before), (slice(length, None), until))
        for columns in (slice(length), slice(length, None))
    )
    return _Chunks(
        r, k, v, a, b, sigmoid, later, later_a, earlier,
        from_start=torch.exp(middle), to_end=torch.exp(with_t[..., -1:, :] - middle),
        ab=ab, ak=ak, rb=rb, rk=rk, inverse=_inverse(ab),
    )  # fmt: skip


def _inverse(x: Tensor) -> Tensor:
    """(I - x)^{-1} of a strictly lower triangular x, (..., L, L).

    By substitution: the product of I + x^(2^i) is as exact on paper, but where keys are alike, its terms are large and cancel.
    """
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    inverse: Tensor = torch.linalg.solve_triangular(one - x, one.expand_as(x), upper=False, unitriangular=True)
    return inverse


def _removal(c: _Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """The rows u_t = S_{t-1} a_t as u = own + by_state S', and the map P that they add to the state's passage."""
    own = c.inverse @ (c.ak @ c.v)  # (C, L, N) value
    by_state = c.inverse @ (c.a * c.later_a * c.from_start)  # (C, L, N) key
    passage = by_state.mT @ (c.b * c.earlier * c.to_end)  # (C, N, N) key by key, added to diag(e^{c_L})
    return own, by_state, passage + torch.diag_embed((c.from_start * c.to_end).squeeze(-2))


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised."""
    batch, heads, size, _ = state.shape
    return state.new_empty(-(-steps // _length(steps)), batch * heads, size, size)


def forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv7`. Kept are the states before each chunk, (chunks, B * H, N, N)."""
    c = _chunks(r, w_raw, k, v, a, b, state.dtype)
    own, by_state, passage = _removal(c)
    written = c.v.mT @ (c.k * c.earlier * c.to_end) + own.mT @ (c.b * c.earlier * c.to_end)
    chunks, rows, _, size = c.r.shape
    states = state.new_empty(chunks + 1, rows, size, size)
    states[0] = state.reshape(rows, size, size)
    for n in range(chunks):
        torch.baddbmm(written[n], states[n], passage[n], out=states[n + 1])
    before = states[:-1]
    y = c.rk @ c.v + c.rb @ (own + by_state @ before.mT) + (c.r * c.later * c.from_start) @ before.mT
    return _join(y, r), states[-1].view_as(state).clone(), before.clone() if keep else state.new_empty(0)


def backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w_raw, k, v, a, b and the first state. The chunks' matrices are made again, not kept."""
    c = _chunks(r, w_raw, k, v, a, b, before.dtype)
    own, by_state, passage = _removal(c)
    chunks, rows, length, size = c.r.shape
    dy_ = _split(dy, length, before.dtype)
    u = own + by_state @ before.mT

    # The gradient of the state passes backwards as D = D' passage' + E.
    entering = dy_.mT @ (c.r * c.later * c.from_start + c.rb @ by_state)
    grads = before.new_empty(chunks + 1, rows, size, size)
    grads[chunks] = dfinal.reshape(rows, size, size)
    for n in reversed(range(chunks)):
        torch.baddbmm(entering[n], grads[n + 1], passage[n].mT, out=grads[n])
    after = grads[1:]

    k_end, b_end = c.k * c.earlier * c.to_end, c.b * c.earlier * c.to_end
    dz = c.inverse.mT @ (c.rb.mT @ dy_ + b_end @ after.mT)  # gradient of the right-hand side that u solves
    dv = c.rk.mT @ dy_ + k_end @ after.mT + c.ak.mT @ dz
    products = torch.cat((dz, dy_), -2) @ torch.cat((u, c.v), -2).mT
    dab, dak = products[..., :length, :length].tril(-1), products[..., :length, length:].tril(-1)
    drb, drk = products[..., length:, :length].tril(), products[..., length:, length:].tril()
    k_, b_, r_, a_ = c.k * c.earlier, c.b * c.earlier, c.r * c.later, c.a * c.later_a
    dr = c.later * (drk @ k_ + drb @ b_ + (dy_ @ before) * c.from_start)
    da = c.later_a * (dak @ k_ + dab @ b_ + (dz @ before) * c.from_start)
    dk = c.earlier * (drk.mT @ r_ + dak.mT @ a_ + (c.v @ after) * c.to_end)
    db = c.earlier * (drb.mT @ r_ + dab.mT @ a_ + (u @ after) * c.to_end)

    # The decay's gradient follows from the others: the product of state and gradient, summed over the values, is known at
    # the chunk's start and at its end, and every row changes it by what the other gradients say. Each row takes both ways
    # there by its nearness: their errors are apart, and grow with the distance.
    ends = before * (c.from_start * c.to_end) + c.v.mT @ k_end + u.mT @ b_end
    from_end = (after * ends).sum(-2, keepdim=True)
    from_start = (grads[:-1] * before).sum(-2, keepdim=True)
    of_a, change = c.a * da, c.k * dk + c.b * db - c.r * dr - c.a * da
    dlog_start = from_start + change.cumsum(-2) - change - of_a
    dlog_end = from_end - change.flip(-2).cumsum(-2).flip(-2) - of_a
    nearness = ((torch.arange(length, device=dy.device) + 0.5) / length).to(dlog_end)[:, None]
    dlog_decay = dlog_start + (dlog_end - dlog_start) * nearness
    # sigmoid(-w) rather than 1 - sigmoid(w), which has no correct digit left at w = 17
    dw_raw = dlog_decay * LOG_DECAY_MIN * c.sigmoid * torch.sigmoid(-_split(w_raw, length, before.dtype))
    grads_of = zip((dr, dw_raw, dk, dv, da, db), (r, w_raw, k, v, a, b), strict=True)
    dr, dw_raw, dk, dv, da, db = (_join(grad, x) for grad, x in grads_of)
    return dr, dw_raw, dk, dv, da, db, grads[0].clone().view_as(dfinal)
