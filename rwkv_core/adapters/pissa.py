"""PiSSA: LoRA that begins as the principal part of the matrix, which is taken out of it.

    W ~ U S V'      A0 = sqrt(S) V', B0 = U sqrt(S)      y = (W - B0 A0) x + B A x        A, B begin at A0, B0

What is trained is what matters most of the matrix from the first step on. A0 and B0 are kept beside A and B: a merge adds
B A - B0 A0 to the matrix as it was.
Source: Meng et al. 2024, arXiv:2404.02948; the randomised decomposition: Halko et al. 2011, arXiv:0909.4061; names RWKV-PEFT.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from rwkv_core.adapters.linear import AdaptedLinear, fitting, wide
from rwkv_core.adapters.lora import beside

if TYPE_CHECKING:
    from rwkv_core.config import PissaConfig


class PissaLinear(AdaptedLinear):
    """A linear layer without its principal part, and that beside it."""

    PARTS: ClassVar = ("lora_A", "lora_B")
    KEPT: ClassVar = ("init_lora_A", "init_lora_B")

    def __init__(
        self,
        base: nn.Linear,
        config: "PissaConfig",
        generator: torch.Generator,
        taken_out: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """See `AdaptedLinear`; `taken_out` are A0 and B0 of another, else they are made."""
        super().__init__(base, config, generator)
        weight = self.weight.detach().to(wide(self.weight))
        if config.rank > min(weight.shape):
            raise ValueError(f"the rank must be at most {min(weight.shape)}, that of the matrix")
        if taken_out is None:
            seed = int(torch.randint(2**62, (), generator=generator))
            taken_out = principal(weight, config.rank, config.iterations, seed)
        a, b = (x.to(weight).contiguous() for x in taken_out)
        self.register_buffer("init_lora_A", a)
        self.register_buffer("init_lora_B", b)
        self.lora_A, self.lora_B = self.part(a.clone()), self.part(b.clone())
        self.weight = nn.Parameter(torch.addmm(weight, b, a, alpha=-1).to(self.weight.dtype), requires_grad=False)

    @classmethod
    def continued(cls, base: nn.Linear, config: "PissaConfig", parts: Mapping[str, Tensor]) -> Self:
        """See `AdaptedLinear.continued`."""
        a, b = _fitting((base.out_features, base.in_features), parts, config)[2:]
        layer = cls(base, config, torch.Generator(), (a, b))
        layer.take(parts)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return beside(x, None, self.weight, self.lora_A, self.lora_B, 1.0)

    @staticmethod
    def frozen(weight: Tensor, parts: Mapping[str, Tensor], config: "PissaConfig") -> Tensor:
        """See `AdaptedLinear.frozen`."""
        _, _, a0, b0 = _fitting(weight.shape, parts, config)
        return torch.addmm(weight, b0, a0, alpha=-1)

    @staticmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: "PissaConfig") -> Tensor:
        """See `AdaptedLinear.merged`."""
        a, b, _, _ = _fitting(weight.shape, parts, config)
        return torch.addmm(weight, b, a)


def _fitting(shape: tuple[int, ...], parts: Mapping[str, Tensor], config: "PissaConfig") -> list[Tensor]:
    """A, B, A0 and B0 beside a matrix of that shape."""
    (out, into), rank = shape, config.rank
    shapes = {"lora_A": (rank, into), "lora_B": (out, rank)}
    return fitting(parts, shapes | {f"init_{name}": shape for name, shape in shapes.items()})


def principal(matrix: Tensor, rank: int, iterations: int, seed: int, spare: int = 0) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), each with half of the singular values: B A is nearly the best of that rank.

    Args:
        matrix: (out, in) float32 or wider.
        rank: at most the smaller side.
        iterations: power iterations; more are more exact.
        seed: of the directions that are tried.
        spare: directions beyond the rank, which make those within it more exact.
    """
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, min(rank + spare, *matrix.shape), iterations)
    return balanced(u[:, :rank], s[:rank], v[:, :rank].mT)


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of singular vectors and values: u (out, rank), s (rank), vh (rank, in)."""
    return s.sqrt()[:, None] * vh, u * s.sqrt()
