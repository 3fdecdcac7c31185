"""Adapters: what is trained beside a frozen model. One file per method; a method is a config, a module and its delta."""

import fnmatch
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.errors import InputError

if TYPE_CHECKING:  # pydantic is not needed to attach
    from rwkv_core.config import AdapterConfig


def attach(model: nn.Module, config: "AdapterConfig", seed: int) -> list[str]:
    """Freeze `model` and put an adapter beside each of its target matrices, in place. It changes nothing yet.

    Args:
        model: with its blocks under `blocks.<i>.`.
        config: which matrices, and what to put beside them.
        seed: of the adapter's initial values.

    Returns:
        Names of the adapted modules, in the model's order.

    Raises:
        InputError: a target matches no matrix, so a part of the adapter would silently not exist.
    """
    model.requires_grad_(False)
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inner = {name: name.split(".", 2)[2] for name in matrices if name.startswith("blocks.")}
    for target in config.targets:
        if not any(fnmatch.fnmatchcase(short, target) for short in inner.values()):
            known = sorted(set(inner.values()))
            raise InputError(
                f"adapter.targets has {target!r}", "each target must match a matrix", f"there are {', '.join(known)}"
            )
    chosen = [name for name, short in inner.items() if any(fnmatch.fnmatchcase(short, t) for t in config.targets)]
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        model.set_submodule(name, LoraLinear(matrices[name], config, generator))
    return chosen


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned: the parameters that require gradients, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
