"""The recurrences by flash-linear-attention (the package fla-core), where it is installed and there is a GPU.

Its state is key by value, ours value by key: it is transposed on the way in and out. Its decays are logarithms. Its products
are of its own precision: bfloat16's for bfloat16 inputs.
"""

import torch
from torch import Tensor

from kernels.wkv7 import LOG_DECAY_MIN


def wkv7(r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.wkv7`, differentiable. All inputs are read in the dtype of r, but the decay, which is float32."""
    from fla.ops.rwkv7 import chunk_rwkv7

    k, v, a, b = (x.to(r.dtype) for x in (k, v, a, b))
    log_decay = LOG_DECAY_MIN * torch.sigmoid(w_raw.float())
    y, final = chunk_rwkv7(
        r, log_decay, k, v, a, b, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True,
        lower_bound=LOG_DECAY_MIN,
    )  # fmt: skip
    return y, final.mT.contiguous()


def wkv6(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.wkv6`, differentiable. All inputs are read in the dtype of r, but the decay, which is float32."""
    from fla.ops.rwkv6 import chunk_rwkv6

    k, v, u = (x.to(r.dtype) for x in (k, v, u))
    log_decay = -torch.exp(w_raw.float())
    y, final = chunk_rwkv6(
        r, k, v, log_decay, u, scale=1.0, initial_state=state.mT.contiguous(), output_final_state=True
    )
    return y, final.mT.contiguous()
