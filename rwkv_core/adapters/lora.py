"""LoRA: a trainable low-rank update beside each frozen matrix.

    y = W x + (alpha / rank) B A dropout(x)        A (rank, in), B (out, rank), B = 0 at first

Source: Hu et al. 2021, arXiv:2106.09685; initial values follow microsoft/LoRA, names RWKV-PEFT.
"""

import math
from typing import TYPE_CHECKING

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
        low = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return F.linear(x, self.weight) + self.scale * F.linear(low, self.lora_B).to(x.dtype)


def delta(tensors: dict[str, Tensor], module: str, config: "LoraConfig") -> Tensor | None:
    """What training added to `module`'s matrix, (out, in) float32; None where the parts are not all there, or do not fit."""
    a, b = (tensors.get(f"{module}.{part}") for part in PARTS)
    if a is None or b is None or not a.ndim == b.ndim == 2 or not len(a) == b.shape[1] == config.rank:
        return None
    return config.alpha / config.rank * (b.float() @ a.float())
