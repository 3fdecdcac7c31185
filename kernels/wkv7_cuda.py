"""WKV-7 in CUDA C++, csrc/cuda/wkv7.h: chunks of 16 steps as products on tensor cores. The operator is in `kernels.wkv7`.

Products are of tf32 for bfloat16 inputs, and as good as float32's for all others. Tensors on the CPU are worked on by the same
code under a stand-in for a GPU, which is slow: for tests.
"""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.compiled import aligned, launch

SEGMENT = 64
"""Steps from one kept state to the next."""

SOURCES = {64: "wkv7", 128: "wkv7_128", 256: "wkv7_256"}
"""By the channels that heads have at most: tiles are so wide, whatever is in them."""

Schedule = Literal["fused", "parallel", "auto"]

schedule: Schedule = "auto"
"""How time is gone through: "fused", by a block for each head, step after step; "parallel", all segments at once, and a scan of
what each makes of the state in between, which pays where there are fewer heads than a GPU has room for; "auto", what should be
faster. Tests and benchmarks set it."""


class Plan(NamedTuple):
    """How a shape is run, as rwkv_wkv7_plan decides. From the third on, numbers of float32 of scratch."""

    parallel: int
    warps: int
    forward_maps: int
    states: int
    parts: int
    backward_maps: int
    ends: int


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each segment."""
    batch, heads, size, _ = state.shape
    padded = size + -size % 8
    return state.new_empty(batch, heads, -(-steps // SEGMENT), padded, padded)


def forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv7`.

    Raises:
        ValueError: heads of more than 256 channels.
        RuntimeError: CUDA's own.
    """
    size = r.shape[-1]
    if size > max(SOURCES):
        raise ValueError(f"heads have {size} channels; CUDA's WKV-7 takes {max(SOURCES)} at most; say op='triton'")
    inputs, state = _readable(r, w_raw, k, v, a, b), aligned(pad(state, (0, -size % 8, 0, -size % 8)))
    shape, plan = _shape(inputs[0])
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    before = kept(r.shape[1], state) if keep or plan.parallel else state.new_empty(0)
    maps = state.new_empty(plan.forward_maps)
    _call("rwkv_wkv7_forward", "19q", inputs[0], *shape, *inputs, state, y, final, before, maps)
    if size % 8:
        y, final = y[..., :size].contiguous(), final[..., :size, :size].contiguous()
    return y.to(r.dtype), final, before if keep else state.new_empty(0)


def backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv7`. The states within a segment are made again, not kept.

    Raises:
        RuntimeError: CUDA's own.
    """
    size = r.shape[-1]
    inputs, dfinal = _readable(r, w_raw, k, v, a, b), aligned(pad(dfinal, (0, -size % 8, 0, -size % 8)))
    dy = aligned(pad(dy.to(inputs[0].dtype), (0, -size % 8)))
    shape, plan = _shape(inputs[0])
    grads = [torch.empty_like(x) for x in (*inputs, dfinal)]
    scratch = [dfinal.new_empty(count) for count in (plan.states, plan.parts, plan.backward_maps, plan.ends)]
    _call("rwkv_wkv7_backward", "28q", inputs[0], *shape, *inputs, before, dy, dfinal, *grads, *scratch)
    if size % 8:
        grads = [grad[..., :size].contiguous() for grad in grads]
        grads[6] = grads[6][..., :size, :].contiguous()
    of_inputs = (grad.to(x.dtype) for grad, x in zip(grads, (r, w_raw, k, v, a, b), strict=False))
    return *of_inputs, grads[6]


def _readable(*xs: Tensor) -> list[Tensor]:
    """All in bfloat16, or all in float32; of a multiple of 8 channels."""
    dtype = torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in xs) else torch.float32
    return [aligned(pad(x.to(dtype), (0, -x.shape[-1] % 8))) for x in xs]


def _shape(x: Tensor) -> tuple[tuple[int, ...], Plan]:
    """The beginning of a record, and the plan that it has a part of."""
    batch, steps, heads, size = x.shape
    plan = _plan(batch, steps, heads, size, x.dtype, x.device, schedule)
    return (batch, steps, heads, size, x.dtype == torch.bfloat16, plan.parallel, plan.warps), plan


@functools.cache
def _plan(
    batch: int, steps: int, heads: int, size: int, dtype: torch.dtype, device: torch.device, schedule: Schedule
) -> Plan:
    x = torch.empty(1, 1, 1, size, device=device)
    result = torch.empty(len(Plan._fields), dtype=torch.int64)
    asked = ("fused", "parallel", "auto").index(schedule)
    _call("rwkv_wkv7_plan", "10q", x, batch, steps, heads, size, dtype == torch.bfloat16, asked, 0, 0, result)
    return Plan(*result.tolist())


def _call(name: str, fields: str, x: Tensor, *values: int | Tensor) -> None:
    """A function for heads like x's."""
    source = next(source for largest, source in SOURCES.items() if x.shape[-1] <= largest)
    launch(source, name, fields, x.device, *values)
