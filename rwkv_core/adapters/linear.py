"""What every method that adapts matrices is made of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rwkv_core.quantize import Packed, hold


class AdaptedLinear(nn.Linear, ABC):
    """A frozen matrix, and what is trained beside it. `weight` keeps its name, so the checkpoint's names still hold.

    A method is a subclass: what it trains, what that computes, and the matrix that computes the same.
    """

    PARTS: ClassVar[tuple[str, ...]]
    """Names of what is trained, as files have them after the module's name."""

    KEPT: ClassVar[tuple[str, ...]] = ()
    """Names of what is not, and that a merge needs too."""

    def __init__(self, base: nn.Linear, config: Any, generator: torch.Generator) -> None:
        """Take the matrix's place, without having an effect yet.

        Args:
            base: (out, in), without bias; its weight may be packed.
            config: of the method.
            generator: of initial values; on the CPU.

        Raises:
            ValueError: the rank does not fit the matrix; the text is the rule.
        """
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        hold(self, base.weight)

    @classmethod
    def continued(cls, base: nn.Linear, config: Any, parts: Mapping[str, Tensor]) -> Self:
        """Take the matrix's place with the effect that another of these had, to the bit.

        Args:
            base: as it was when the other took its place.
            config: of the method.
            parts: PARTS and KEPT of the other, by name.

        Raises:
            ValueError: they are others, or of other shapes.
        """
        layer = cls(base, config, torch.Generator())
        layer.take(parts)
        return layer

    @torch.no_grad()
    def take(self, parts: Mapping[str, Tensor]) -> None:
        """Set PARTS and KEPT.

        Raises:
            ValueError: as `continued`.
        """
        held: dict[str, Tensor] = {name: getattr(self, name) for name in (*self.PARTS, *self.KEPT)}
        given = fitting(parts, {name: tuple(x.shape) for name, x in held.items()})
        for x, value in zip(held.values(), given, strict=True):
            x.copy_(value)

    def part(self, x: Tensor) -> nn.Parameter:
        """A trained tensor of these initial values: in full precision, even beside a base in bfloat16."""
        return nn.Parameter(x.to(self.weight.device, wide(self.weight)))

    @staticmethod
    def frozen(weight: Tensor, parts: Mapping[str, Tensor], config: Any) -> Tensor:
        """What stays of the matrix beside the parts: all of it, but for methods that take something out.

        Arguments and errors are those of `merged`.
        """
        return weight

    @staticmethod
    @abstractmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: Any) -> Tensor:
        """The matrix that computes what both do.

        Args:
            weight: (out, in) float32, what `frozen` gave; as it is once packed, if it was in training.
            parts: what was trained beside it, float32, by name.
            config: of the method.

        Raises:
            ValueError: the parts are not of the shapes that config and weight ask for.
        """


def wide(x: Tensor | Packed) -> torch.dtype:
    """What sums over x are made in, and what is trained of it held in: float32, or more where x has more."""
    return torch.promote_types(x.dtype, torch.float32)


def rows(x: Tensor) -> Tensor:
    """(..., C) -> (M, C)."""
    return x.reshape(-1, x.shape[-1])


def autocast(x: Tensor) -> Tensor:
    """In the dtype that mixed precision has for products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def apply(function: type[torch.autograd.Function], x: Tensor, *given: Any) -> Tensor:
    """A function of x that does itself what autocast would do within."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        y: Tensor = function.apply(x, *given)  # type: ignore[no-untyped-call]
        return y
    with torch.autocast(device, enabled=False):
        y = function.apply(x.to(torch.get_autocast_dtype(device)), *given)  # type: ignore[no-untyped-call]
    return y


def fitting(parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The parts in the order of `shapes`.

    Raises:
        ValueError: they are others, or of other shapes.
    """
    found = {name: tuple(x.shape) for name, x in parts.items()}
    if found != dict(shapes):
        raise ValueError(f"has {found or 'nothing'}; it must be {dict(shapes)}")
    return [parts[name] for name in shapes]
