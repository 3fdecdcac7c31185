"""WKV-4 in CUDA C++, csrc/cuda/wkv4.cu: step by step in float32, all channels at once. The operator is in `kernels.wkv4`.

Tensors on the CPU are worked on by the same code under a stand-in for a GPU, which is slow: for tests.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.compiled import launch

CHUNK = 32
"""Steps from one kept state to the next."""

THREADS = 1024
"""Of as many, a thread for each channel, a multiprocessor hides how long each waits for memory, and for the step before."""

Schedule = Literal["fused", "parallel", "auto"]

schedule: Schedule = "auto"
"""How time is gone through: "fused", step after step; "parallel", all chunks at once, and a scan of what each makes of the
state in between; "auto", in so many segments as fill the GPU. Tests and benchmarks set it."""


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each chunk, and the last."""
    return state.new_empty(-(-steps // CHUNK) + 1, *state.shape)


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv4`.

    Raises:
        RuntimeError: CUDA's own.
    """
    inputs, state = _readable(k, v, w, u), state.contiguous()
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    per, segments = _plan(k)
    before = kept(k.shape[1], state) if keep or segments > 1 else state.new_empty(0)
    _call("rwkv_wkv4_forward", "14q", inputs[0], per, *inputs, state, y, final, before)
    return y.to(k.dtype), final, before if keep else state.new_empty(0)


def backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv4`. The states within a chunk are made again, not kept.

    Raises:
        RuntimeError: CUDA's own.
    """
    inputs, dfinal = _readable(k, v, w, u), dfinal.contiguous()
    dy = dy.to(inputs[0].dtype).contiguous()
    grads = [torch.empty_like(x) for x in (*inputs, dfinal)]
    per, segments = _plan(k)
    batch, _, channels = k.shape
    after = dfinal.new_empty(segments if segments > 1 else 0, *dfinal.shape)
    parts = dfinal.new_empty(segments, batch, 2, channels)
    _call("rwkv_wkv4_backward", "20q", inputs[0], per, *inputs, before, dy, dfinal, *grads, after, parts)
    return *(grad.to(x.dtype) for grad, x in zip(grads, (k, v, w, u), strict=False)), grads[4]


def _plan(k: Tensor) -> tuple[int, int]:
    """Chunks in a segment, and how many segments there are.

    All are gone through at once, but for one more than once. So few gain nothing, and one is best where channels alone fill
    the GPU.
    """
    batch, steps, channels = k.shape
    chunks = -(-steps // CHUNK)
    places = THREADS * torch.cuda.get_device_properties(k.device).multi_processor_count if k.is_cuda else 1
    room = places // (batch * channels)
    per = -(-chunks // min(chunks, {"fused": 1, "parallel": chunks, "auto": room if room > 4 else 1}[schedule]))
    return per, -(-chunks // per)


def _readable(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> list[Tensor]:
    """Both k and v in bfloat16, or in float32; w and u in float32."""
    dtype = torch.bfloat16 if k.dtype == v.dtype == torch.bfloat16 else torch.float32
    return [x.contiguous() for x in (k.to(dtype), v.to(dtype), w.float(), u.float())]


def _call(name: str, fields: str, k: Tensor, per: int, *tensors: Tensor) -> None:
    launch("wkv4", name, fields, k.device, *tensors, *k.shape, per, k.dtype == torch.bfloat16)
