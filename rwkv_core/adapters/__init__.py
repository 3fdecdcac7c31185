"""Adapters: what is trained of a model, or beside it. One file per method."""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rwkv_core.adapters.bat import BatLinear
from rwkv_core.adapters.bone import BoneLinear
from rwkv_core.adapters.dora import DoraLinear
from rwkv_core.adapters.linear import AdaptedLinear, wide
from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.adapters.pissa import PissaLinear
from rwkv_core.adapters.state import give
from rwkv_core.errors import InputError
from rwkv_core.formats import tuned_state
from rwkv_core.quantize import Packed, hold

if TYPE_CHECKING:  # pydantic is not needed to attach
    from rwkv_core.config import AdapterConfig

METHODS: dict[str, type[AdaptedLinear]] = {
    "lora": LoraLinear, "pissa": PissaLinear, "bone": BoneLinear, "bat": BatLinear
}  # fmt: skip
"""What stands in a matrix's place, by kind. "full" and "state" have none: they train parameters of the model itself."""


def method(config: "AdapterConfig") -> type[AdaptedLinear]:
    """What a config puts in a matrix's place."""
    return DoraLinear if config.kind == "lora" and config.dora else METHODS[config.kind]


def attach(
    model: nn.Module, config: "AdapterConfig", seed: int, originals: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Freeze `model` but for what the method trains, in place. It computes what it did, but for PiSSA's rounding.

    Args:
        model: with its blocks under `blocks.<i>.`; their matrices may be packed.
        config: the method, and on which parts.
        seed: of the adapter's initial values.
        originals: the tensors of the checkpoint. A method that takes something out of a packed matrix takes it out of the
            original, if that is given, and packs what is left.

    Returns:
        Names of the adapted modules, in the model's order.

    Raises:
        InputError: a pattern matches nothing, so something would silently not be trained; one asks for a matrix that is
            adapted, or packed; the model has no such layer; the rank does not fit a matrix; or an RWKV-4 is to have a tuned
            state.
    """
    model.requires_grad_(False)
    give(model, config.state)
    parameters = dict(_parameters(model))
    adapted, also = select(config, parameters)
    packed = [name for name in also if parameters[name].is_meta]
    if packed:
        raise InputError(
            f"adapter.also has {packed[0]}", "model.quantize packs that matrix", "adapt it, or set model.quantize: none"
        )
    generator = torch.Generator().manual_seed(seed)
    for name in adapted:
        try:
            module = _adapted(model.get_submodule(name), config, generator, (originals or {}).get(f"{name}.weight"))
        except ValueError as error:
            raise InputError(f"adapter.rank beside {name}", str(error), "set one that does") from None
        model.set_submodule(name, module)
    for name in also:
        p = parameters[name]
        p.data = p.data.to(wide(p))  # small steps would be lost in bfloat16
        p.requires_grad_(True)
    return adapted


def _adapted(
    base: nn.Module, config: "AdapterConfig", generator: torch.Generator, original: Tensor | None
) -> AdaptedLinear:
    make, packed = method(config), base.weight
    takes_out = make.frozen is not AdaptedLinear.frozen
    if not (takes_out and isinstance(packed, Packed)):
        return make(base, config, generator)  # type: ignore[arg-type]
    whole = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta")
    weight = packed.unpacked() if original is None else original.to(packed.device, torch.float32)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    module = make(whole, config, generator)
    hold(module, Packed(module.weight, packed.form))
    return module


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's, by their names in a checkpoint; of a packed one no more than its shape is there."""
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Packed):
            yield name.rpartition(".")[0], torch.empty(module.shape, device="meta")
        else:
            yield name, p


def select(config: "AdapterConfig", tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """What a method works on.

    Args:
        config: the method.
        tensors: a model's, by their names in a checkpoint; with a tuned state, if the method has one.

    Returns:
        Names of the matrices that it adapts, without ".weight", in the order of `tensors`; and of the tensors that it trains as
        they are, in that order too, the state's last: they are of all blocks, whatever `layers` says.

    Raises:
        InputError: as `attach`.
    """
    layers = layer_numbers(config.layers, layer_count(tensors), "adapter.layers")
    own = [name for name in tensors if not tuned_state.is_part(name)]
    there = [name for name in own if not _in_block(name) or layer(name) in layers]
    adapted: list[str] = []
    if config.kind != "full" and config.kind != "state":
        matrices = [name.removesuffix(".weight") for name in there if is_matrix(name, tensors[name])]
        adapted = _matching("targets", config.targets, matrices)
    also = _matching("also", config.also, there)
    twice = sorted({f"{name}.weight" for name in adapted} & set(also))
    if twice:
        raise InputError(
            f"adapter.also has {twice[0]}",
            "that matrix is adapted",
            "leave it to adapter.targets, or take it out there",
        )
    return adapted, also + [name for name in tensors if inner(name) in tuned_state.PARTS[config.state]]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned, by name: the parameters that require gradients; and what a merge needs beside them."""
    kept = {f"{name}.{part}" for name, m in model.named_modules() if isinstance(m, AdaptedLinear) for part in m.KEPT}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: x.detach() for name, x in model.state_dict(keep_vars=True).items() if name in trained | kept}


def _matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Of the names, in their order, those that a pattern matches: inside their block, or whole outside of any.

    Raises:
        InputError: a pattern matches none.
    """
    short = {name: inner(name) for name in names}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(known, pattern) for known in short.values()):
            what = "a matrix" if setting == "targets" else "a parameter"
            raise InputError(
                f"adapter.{setting} has {pattern!r}",
                f"each must match {what} of adapter.layers",
                f"there are {', '.join(sorted(set(short.values())))}",
            )
    return [name for name, known in short.items() if any(fnmatch.fnmatchcase(known, p) for p in patterns)]


def is_matrix(name: str, x: Tensor) -> bool:
    """Whether a model's tensor is a matrix of a linear layer in a block: what can be adapted, and packed."""
    return _in_block(name) and name.endswith(".weight") and x.ndim == 2


def inner(name: str) -> str:
    """A tensor's name inside its block; whole, outside of any."""
    return name.split(".", 2)[2] if _in_block(name) else name


def layer(name: str) -> int | None:
    """The number of a tensor's block; None outside of any."""
    return int(name.split(".")[1]) if _in_block(name) else None


def layer_count(names: Iterable[str]) -> int:
    """How many blocks there are."""
    return 1 + max(number for name in names if (number := layer(name)) is not None)


def _in_block(name: str) -> bool:
    return name.startswith("blocks.")


def layer_numbers(text: str, count: int, setting: str) -> range | list[int]:
    """The numbers that "all" or "0-3 25-31" means.

    Args:
        text: numbers and ranges, or "all".
        count: how many layers the model has.
        setting: what the text is the value of, for messages.

    Raises:
        InputError: the model has no such layer, or the text is no such list.
    """
    if text == "all":
        return range(count)
    chosen: list[int] = []
    for item in text.split():
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        numbers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not numbers or numbers[-1] >= count:
            raise InputError(
                f"{setting} has {item}",
                f"the model's layers are 0 to {count - 1}",
                "name some of these as in 0-3 7, or all",
            )
        chosen += numbers
    return chosen
