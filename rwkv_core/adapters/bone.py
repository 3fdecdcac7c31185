"""Bone, today's MiSS: one small matrix, which every stretch of `rank` inputs goes through.

    y = W x + D' sum_g x[g rank : (g + 1) rank]        D (rank, out), 0 at first; x is as if followed by zeros

So W'[o, j] = W[o, j] + D[j mod rank, o]. Half the parameters and products of a LoRA of the same rank, and the backward needs
the sums alone: nothing as wide as x is kept.
Source: Kang and Yin 2024, arXiv:2409.15371; names RWKV-PEFT (DiSHA, mode "bone").
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kernels import products
from rwkv_core.adapters.linear import AdaptedLinear, apply, fitting, rows
from rwkv_core.quantize import Packed, product, product_back

if TYPE_CHECKING:
    from rwkv_core.config import BoneConfig


class BoneLinear(AdaptedLinear):
    """A linear layer with the small matrix beside it."""

    PARTS: ClassVar = ("disha",)

    def __init__(self, base: nn.Linear, config: "BoneConfig", generator: torch.Generator) -> None:
        """See `AdaptedLinear`."""
        super().__init__(base, config, generator)
        if config.rank > base.in_features:
            raise ValueError(f"the rank must be at most the {base.in_features} inputs")
        self.disha = self.part(torch.zeros(config.rank, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return apply(_Adapted, x, self.weight, self.disha)

    @staticmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: "BoneConfig") -> Tensor:
        """See `AdaptedLinear.merged`."""
        out, into = weight.shape
        (d,) = fitting(parts, {"disha": (config.rank, out)})
        return weight + d.mT[:, torch.arange(into, device=d.device) % config.rank]


class _Adapted(torch.autograd.Function):
    """y = x W' + fold(x) D in the dtype of x, with W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Packed, d: Tensor) -> Tensor:
        sums = fold(rows(x), len(d))
        y = product(x, weight)
        products.put(rows(y), sums, d.to(x.dtype), beta=1)
        ctx.save_for_backward(sums, d)
        ctx.weight, ctx.shape = weight, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        sums, d = ctx.saved_tensors
        dy = rows(grads[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product_back(dy, ctx.weight)
            unfold(products.product(dy, d.to(dy.dtype).mT), dx)
        dd = products.product(sums.mT, dy).to(d.dtype)
        return None if dx is None else dx.view(ctx.shape), None, dd


def fold(x: Tensor, rank: int) -> Tensor:
    """The sum of all stretches of `rank` columns: (M, C) -> (M, rank). The last may be shorter."""
    whole = x.shape[1] // rank * rank
    sums = x[:, :whole].view(len(x), -1, rank).sum(1)
    if whole < x.shape[1]:
        sums[:, : x.shape[1] - whole] += x[:, whole:]
    return sums


def unfold(sums: Tensor, x: Tensor) -> None:
    """Add (M, rank) to every stretch of `rank` columns of x (M, C), in place."""
    rank = sums.shape[1]
    whole = x.shape[1] // rank * rank
    x[:, :whole].view(len(x), -1, rank).add_(sums[:, None])
    if whole < x.shape[1]:
        x[:, whole:] += sums[:, : x.shape[1] - whole]
