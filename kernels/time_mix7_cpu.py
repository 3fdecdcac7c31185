"""What surrounds WKV-7 in C++, csrc/time_mix7.cpp: one pass each, in float32. The operators are in `kernels.time_mix7`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import build
from kernels.choice import CPU_DTYPES


def prepare(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `kernels.time_mix7._prepare`."""
    xs, ps = _readable((k0, v0, v_first, a_raw, v_raw)), _readable((k_k, k_a))
    first, parameter = _given(xs)[0], _given(ps)[0]
    shape = (*k0.shape[:-1], k0.shape[-1] // size, size)
    k, v, a, b = first.new_empty(shape), first.new_empty(shape), first.new_empty(shape), first.new_empty(shape)
    build.function("time_mix7", "rwkv_prepare7", "17q")(
        *_addresses(*xs, *ps, k, v, a, b), *_sizes(first, parameter, size)
    )
    if first.dtype is k0.dtype is v0.dtype:
        return k, v, a, b
    return k.to(k0.dtype), v.to(v0.dtype), a.to(k0.dtype), b.to(k0.dtype)


def prepare_backward(
    k0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, v: Tensor | None, k_k: Tensor, k_a: Tensor,
    dk: Tensor, dv: Tensor, da: Tensor, db: Tensor, size: int, wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `kernels.time_mix7._prepare_backward`."""
    xs, ps = _readable((k0, v_first, a_raw, v_raw, v, dk, dv, da, db)), _readable((k_k, k_a))
    first, parameter = _given(xs)[0], _given(ps)[0]
    grads = [None if x is None else torch.empty_like(first) for x in (k0, dv, v_first, a_raw, v_raw)]
    of_parameters = [torch.empty_like(p) if wanted else None for p in _given(ps)]
    build.function("time_mix7", "rwkv_prepare7_backward", "24q")(
        *_addresses(*xs[:5], *ps, *xs[5:], *grads, *of_parameters), *_sizes(first, parameter, size)
    )
    return _in_dtypes((*grads, *of_parameters), (k0, dv, v_first, a_raw, v_raw, k_k, k_a))


def readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    """See `kernels.time_mix7._readout`."""
    xs, ps = _given(_readable((y, r, k, v, g))), _given(_readable((weight, bias, r_k)))
    out = torch.empty_like(xs[4])
    build.function("time_mix7", "rwkv_readout7", "9qd6q")(
        *_addresses(*xs, *ps, out), eps, *_sizes(xs[0], ps[0], y.shape[-1])
    )
    return out.to(y.dtype)


def readout_backward(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, dout: Tensor,
    eps: float, wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `kernels.time_mix7._readout_backward`."""
    xs, ps = _given(_readable((y, r, k, v, g, dout))), _given(_readable((weight, bias, r_k)))
    grads = [torch.empty_like(x) for x in xs[:5]]
    of_parameters = [torch.empty_like(p) if wanted else None for p in ps]
    build.function("time_mix7", "rwkv_readout7_backward", "17qd6q")(
        *_addresses(*xs[:5], *ps, xs[5], *grads, *of_parameters), eps, *_sizes(xs[0], ps[0], y.shape[-1])
    )
    return _in_dtypes((*grads, *of_parameters), (y, r, k, v, g, weight, bias, r_k))


def _readable(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same, contiguous and of one type that the C++ reads: float32 if they differ."""
    dtypes = {x.dtype for x in xs if x is not None}
    if len(dtypes) > 1 or dtypes.isdisjoint(CPU_DTYPES):
        xs = [None if x is None else x.float() for x in xs]
    return [None if x is None else x.contiguous() for x in xs]


def _given(xs: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in xs if x is not None]


def _addresses(*xs: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in xs]


def _sizes(x: Tensor, parameter: Tensor, size: int) -> tuple[int, ...]:
    """The end of each record: rows, heads, N, types, threads."""
    channels, bf16 = parameter.numel(), torch.bfloat16
    return x.numel() // channels, channels // size, size, x.dtype is bf16, parameter.dtype is bf16, build.threads()


def _in_dtypes(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Each gradient in the dtype of its input; an empty one where there is none."""
    anyone = _given(grads)[0]
    return tuple(
        anyone.new_empty(0) if grad is None or x is None else grad.to(x.dtype)
        for grad, x in zip(grads, inputs, strict=True)
    )
