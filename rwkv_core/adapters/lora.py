"""LoRA: a trainable low-rank update beside each frozen matrix.

    y = W x + scale B A dropout(x)        A (rank, in), B (out, rank), B = 0 at first

The scale is alpha / rank, or alpha / sqrt(rank): then the update of a high rank is not smaller than that of a low one (rsLoRA).
Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; initial values follow microsoft/LoRA, names
RWKV-PEFT.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import products
from rwkv_core.adapters.linear import AdaptedLinear, apply, autocast, fitting, rows
from rwkv_core.quantize import Packed, product, product_back

if TYPE_CHECKING:  # pydantic is not needed to attach
    from rwkv_core.config import LoraConfig


class LoraLinear(AdaptedLinear):
    """A linear layer with the update beside it."""

    PARTS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear, config: "LoraConfig", generator: torch.Generator) -> None:
        """See `AdaptedLinear`."""
        super().__init__(base, config, generator)
        self.scale, self.dropout = scale(config), config.dropout
        a = torch.empty(config.rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = self.part(a)
        self.lora_B = self.part(torch.zeros(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        read = None
        if self.training and self.dropout:
            x = autocast(x)
            read = F.dropout(x, self.dropout)
        return beside(x, read, self.weight, self.lora_A, self.lora_B, self.scale)

    @staticmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: "LoraConfig") -> Tensor:
        """See `AdaptedLinear.merged`."""
        out, into = weight.shape
        a, b = fitting(parts, {"lora_A": (config.rank, into), "lora_B": (out, config.rank)})
        return torch.addmm(weight, b, a, alpha=scale(config))


def beside(x: Tensor, read: Tensor | None, weight: Tensor | Packed, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W x + scale B A read, where `read` is x if it is None; (..., in) -> (..., out)."""
    return apply(_Adapted, x, read, weight, a, b, scale)


def scale(config: "LoraConfig") -> float:
    """What the update is multiplied by."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)


class _Adapted(torch.autograd.Function):
    """y = x W' + scale (read A') B' in the dtype of x, with W frozen; `read` is None where it is x.

    By torch's own gradients, each of the sums y, dx and dread would cost more passes over memory than its products need.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Tensor | None, weight: Tensor | Packed, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        kept = x if read is None else read
        low = products.product(rows(kept), a.to(x.dtype).mT)
        y = product(x, weight)
        products.put(rows(y), low, b.to(x.dtype).mT, beta=1, alpha=scale)
        ctx.save_for_backward(kept, low, a, b)
        ctx.weight, ctx.scale, ctx.is_x = weight, scale, read is None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        kept, low, a, b = ctx.saved_tensors
        wants_x, wants_read = ctx.needs_input_grad[:2]
        dy, shape, scale = rows(grads[0]), kept.shape, ctx.scale
        dlow = products.product(dy, b.to(dy.dtype))
        dx = product_back(dy, ctx.weight) if wants_x else None
        dread = products.product(dlow, a.to(dy.dtype), scale) if wants_read else None
        if dx is not None and ctx.is_x:
            products.put(dx, dlow, a.to(dy.dtype), beta=1, alpha=scale)
        da = products.product(dlow.mT, rows(kept), scale)
        db = products.product(low.mT, dy, scale).mT  # a wide result is faster to make than a tall one
        return (
            None if dx is None else dx.view(shape), None if dread is None else dread.view(shape), None,
            da.to(a.dtype), db.to(b.dtype), None,
        )  # fmt: skip
