"""LoRA: a trainable low-rank update beside each frozen matrix.

    y = W x + (alpha / rank) B A dropout(x)        A (rank, in), B (out, rank), B = 0 at first

Source: Hu et al. 2021, arXiv:2106.09685; initial values follow microsoft/LoRA, names RWKV-PEFT.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # pydantic is not needed to attach
    from rwkv_core.config import LoraConfig


PARTS = ("lora_A", "lora_B")
"""Names of the trained tensors, after the adapted module's."""


class LoraLinear(nn.Linear):
    """A linear layer with the update beside it. `weight` keeps its name, so the checkpoint's names still hold."""

    def __init__(self, base: nn.Linear, config: "LoraConfig", generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight.requires_grad_(False)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        wide = torch.promote_types(base.weight.dtype, torch.float32)  # the update itself is learned in full precision
        a = torch.empty(config.rank, base.in_features, dtype=wide)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=wide, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        read = F.dropout(x, self.dropout) if self.training and self.dropout else None
        with torch.autocast(device, enabled=False):  # what it would do is done above
            y: Tensor = _Adapted.apply(x, read, self.weight, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-untyped-call]
        return y


class _Adapted(torch.autograd.Function):
    """y = x W' + scale (read A') B' in the dtype of x, with W frozen; `read` is None where it is x.

    By torch's own gradients, each of the sums y, dx and dread would cost more passes over memory than its products need.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        kept = x if read is None else read
        low = F.linear(_rows(kept), a.to(x.dtype))
        y = F.linear(x, weight.to(x.dtype))
        _rows(y).addmm_(low, b.to(x.dtype).mT, alpha=scale)
        ctx.save_for_backward(kept, low, weight, a, b)
        ctx.scale, ctx.is_x = scale, read is None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        kept, low, weight, a, b = ctx.saved_tensors
        wants_x, wants_read = ctx.needs_input_grad[:2]
        dy, shape, scale = _rows(grads[0]), kept.shape, ctx.scale
        dlow = dy @ b.to(dy.dtype)
        dx = dy @ weight.to(dy.dtype) if wants_x else None
        dread = _product(dlow, a.to(dy.dtype), scale) if wants_read else None
        if dx is not None and ctx.is_x:
            dx.addmm_(dlow, a.to(dy.dtype), alpha=scale)
        da, db = _product(dlow.mT, _rows(kept), scale), _product(dy.mT, low, scale)
        return (
            None if dx is None else dx.view(shape), None if dread is None else dread.view(shape), None,
            da.to(a.dtype), db.to(b.dtype), None,
        )  # fmt: skip


def _product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The product x y, scaled: no dearer than without."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scale)  # beta 0: the first is not read


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def delta(tensors: dict[str, Tensor], module: str, config: "LoraConfig") -> Tensor | None:
    """What training added to `module`'s matrix, (out, in) float32; None where the parts are not all there, or do not fit."""
    a, b = (tensors.get(f"{module}.{part}") for part in PARTS)
    if a is None or b is None or not a.ndim == b.ndim == 2 or not len(a) == b.shape[1] == config.rank:
        return None
    return config.alpha / config.rank * (b.float() @ a.float())
