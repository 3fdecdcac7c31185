"""DoRA: LoRA turns the rows of the matrix, and how long each is is learned beside.

    y = m / |W + scale B A| (W + scale B A) x        m (out,), |.| of each row; m = |W| at first

Source: Liu et al. 2024, arXiv:2402.09353; names Hugging Face's peft. Both pass no gradient through the length |.|, to save
memory; here it costs none to speak of, and gradients are exact.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rwkv_core.adapters.linear import fitting, wide
from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.quantize import Packed, frozen_product

if TYPE_CHECKING:
    from rwkv_core.config import LoraConfig

_SHORTEST = 1e-20
"""A row of zeros counts as so long: it has no direction to keep."""


class DoraLinear(LoraLinear):
    """A linear layer with the update and the lengths beside it."""

    PARTS: ClassVar = (*LoraLinear.PARTS, "lora_magnitude_vector")

    def __init__(self, base: nn.Linear, config: "LoraConfig", generator: torch.Generator) -> None:
        """See `AdaptedLinear`."""
        super().__init__(base, config, generator)
        self._squares: Tensor
        self.register_buffer("_squares", _squares(self.weight), persistent=False)
        self.lora_magnitude_vector = self.part(self._lengths().detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = super().forward(x)
        return y * (self.lora_magnitude_vector / self._lengths()).to(y.dtype)

    def _lengths(self) -> Tensor:
        """Of the rows of W + scale B A: from those of W, its products with A, and the square of A, none as large as W."""
        a, b = self.lora_A, self.lora_B
        with torch.autocast(a.device.type, enabled=False):
            once = frozen_product(a, self.weight).mT  # W A'
            twice = b @ (a @ a.mT)
            squares: Tensor = self._squares + (b * (2 * self.scale * once + self.scale**2 * twice)).sum(1)
        return torch.sqrt(squares.clamp(min=_SHORTEST**2))

    @staticmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: "LoraConfig") -> Tensor:
        """See `AdaptedLinear.merged`."""
        (out, into), rank = weight.shape, config.rank
        shapes = {"lora_A": (rank, into), "lora_B": (out, rank), "lora_magnitude_vector": (out,)}
        a, b, m = fitting(parts, shapes)
        turned = LoraLinear.merged(weight, {"lora_A": a, "lora_B": b}, config)
        lengths: Tensor = torch.linalg.vector_norm(turned, dim=1)
        return turned * (m / lengths.clamp(min=_SHORTEST))[:, None]


@torch.no_grad()
def _squares(weight: Tensor | Packed) -> Tensor:
    """Of the lengths of the rows: (out,), in what sums are made in."""
    if isinstance(weight, Packed):
        return torch.cat([tile.square().sum(1) for _, tile in weight.tiles(weight.dtype)])
    return torch.cat([rows.to(wide(weight)).square().sum(1) for rows in torch.split(weight, 1024)])
