"""WKV-6 in CUDA C++, csrc/cuda/wkv6.cu: chunks of 64 steps as products on tensor cores. The operator is in `kernels.wkv6`.

Products are of tf32 for bfloat16 inputs, and as good as float32's for all others. Tensors on the CPU are worked on by the same
code under a stand-in for a GPU, which is slow: for tests.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.compiled import aligned, launch

CHUNK = 64
"""Steps from one kept state to the next."""

LARGEST = 256
"""Channels of a head at most."""

ALIGNED = 4
"""The kernels take heads of a multiple of so many channels: others are filled up with zeros."""

BLOCKS = 4
"""Of the kernel that goes through time, a multiprocessor runs so many blocks at once."""

Schedule = Literal["fused", "parallel", "auto"]

schedule: Schedule = "auto"
"""How time is gone through: "fused", by a block for each head, step after step; "parallel", all chunks at once, and a scan of
what each makes of the state in between; "auto", in so many segments as fill the GPU. Tests and benchmarks set it."""


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each chunk."""
    batch, heads, size, _ = state.shape
    size += -size % ALIGNED
    return state.new_empty(batch * heads, -(-steps // CHUNK), size, size)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv6`.

    Raises:
        ValueError: heads of more than 256 channels.
        RuntimeError: CUDA's own.
    """
    inputs, start = _readable(r, k, v, w_raw, u), _square(state)
    y, final = torch.empty_like(inputs[0]), torch.empty_like(start)
    per, segments = _plan(inputs[0])
    before = kept(r.shape[1], start) if keep or segments > 1 else start.new_empty(0)
    decays = start.new_empty(len(before), segments - 1, start.shape[-1])
    _call("rwkv_wkv6_forward", "17q", inputs[0], per, *inputs, start, y, final, before, decays)
    return _like(y, r), _like(final, state), before if keep else start.new_empty(0)


def backward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv6`.

    Raises:
        RuntimeError: CUDA's own.
    """
    inputs, end = _readable(r, k, v, w_raw, u), _square(dfinal)
    dy = aligned(_filled(dy.to(inputs[0].dtype), 1))
    grads = [torch.empty_like(x) for x in (*inputs, end)]
    per, segments = _plan(inputs[0])
    batch, steps, heads, size = inputs[0].shape
    after, decays = kept(steps, end), end.new_empty(batch * heads, segments - 1, size)
    dus = end.new_empty(-(-steps // CHUNK), batch, heads, size)
    _call("rwkv_wkv6_backward", "24q", inputs[0], per, *inputs, before, dy, end, *grads, after, decays, dus)
    return tuple(_like(grad, x) for grad, x in zip(grads, (r, k, v, w_raw, u, dfinal), strict=True))


def _plan(r: Tensor) -> tuple[int, int]:
    """Chunks in a segment, and how many segments there are.

    All are gone through at once, but for the last twice. So two gain nothing, and one is best where heads alone fill the GPU.
    """
    batch, steps, heads, size = r.shape
    if size > LARGEST:
        raise ValueError(
            f"heads have {size} channels; CUDA's WKV-6 takes {LARGEST} at most; say op='triton' or 'torch'"
        )
    chunks = -(-steps // CHUNK)
    blocks = batch * heads * (1 if size <= 64 else -(-size // 32))
    room = BLOCKS * torch.cuda.get_device_properties(r.device).multi_processor_count // blocks if r.is_cuda else 1
    wanted = {"fused": 1, "parallel": chunks, "auto": room if room > 2 else 1}[schedule]
    per = -(-chunks // min(chunks, wanted))
    return per, -(-chunks // per)


def _readable(*xs: Tensor) -> list[Tensor]:
    """All but the last, u, in bfloat16, or in float32; u in float32."""
    *timed, u = xs
    dtype = torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in timed) else torch.float32
    return [aligned(_filled(x, 1)) for x in (*(x.to(dtype) for x in timed), u.float())]


def _square(state: Tensor) -> Tensor:
    return aligned(_filled(state, 2))


def _filled(x: Tensor, axes: int) -> Tensor:
    """The last `axes` of a size that the kernels take."""
    more = -x.shape[-1] % ALIGNED
    return pad(x, (0, more) * axes) if more else x


def _like(x: Tensor, like: Tensor) -> Tensor:
    """Without what `_filled` has added, in the dtype of `like`."""
    x = x.to(like.dtype)
    return x if x.shape == like.shape else x[tuple(slice(n) for n in like.shape)].contiguous()


def _call(name: str, fields: str, r: Tensor, per: int, *tensors: Tensor) -> None:
    launch("wkv6", name, fields, r.device, *tensors, *r.shape, per, r.dtype == torch.bfloat16)
