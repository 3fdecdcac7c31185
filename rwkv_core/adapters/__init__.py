"""Adapters: what is trained of a model, or beside it. One file per method."""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_core.adapters.bat import BatLinear
from rwkv_core.adapters.bone import BoneLinear
from rwkv_core.adapters.dora import DoraLinear
from rwkv_core.adapters.linear import AdaptedLinear, wide
from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.adapters.peft import PeftLinear
from rwkv_core.adapters.pissa import PissaLinear
from rwkv_core.adapters.rows import PARTS, Rows, check, placed, stand_in
from rwkv_core.adapters.state import give
from rwkv_core.errors import InputError
from rwkv_core.formats import tuned_state
from rwkv_core.quantize import Packed, hold

if TYPE_CHECKING:  # pydantic is not needed to attach
    from rwkv_core.config import AdapterConfig

METHODS: dict[str, type[AdaptedLinear]] = {
    "lora": LoraLinear, "pissa": PissaLinear, "bone": BoneLinear, "bat": BatLinear, "peft": PeftLinear
}  # fmt: skip
"""What stands in a matrix's place, by kind. "full" and "state" have none: they train parameters of the model itself."""


def method(config: "AdapterConfig") -> type[AdaptedLinear]:
    """What a config puts in a matrix's place."""
    return DoraLinear if config.kind == "lora" and config.dora else METHODS[config.kind]


def attach(
    model: nn.Module,
    config: "AdapterConfig",
    seed: int,
    *,
    originals: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Freeze `model` but for what the method trains, in place. It computes what it did, but for PiSSA's rounding.

    Args:
        model: with its blocks under `blocks.<i>.`; their matrices may be packed.
        config: the method, and on which parts.
        seed: of the adapter's initial values.
        originals: the tensors of the checkpoint. A method that takes something out of a packed matrix takes it out of the
            original, if that is given, and packs what is left.
        start: the `trained_state` of another model of this base and method, whose values it begins with instead. Then the
            model computes what that one did, to the bit.

    Returns:
        Names of the adapted modules, in the model's order.

    Raises:
        InputError: a pattern matches nothing, so something would silently not be trained; one asks for a matrix that is
            adapted, or packed; the model has no such layer; the rank does not fit a matrix; an RWKV-4 is to have a tuned
            state; or `start` lacks something, has more, or is of other shapes.
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
        base: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        try:
            parts = None if start is None else _under(name, start)
            module = _adapted(base, config, generator, (originals or {}).get(f"{name}.weight"), parts)
        except ValueError as error:
            if start is not None:
                raise InputError(f"adapter.load: {name}", str(error), _OTHER) from None
            setting = "config" if config.kind == "peft" else "rank"
            raise InputError(f"adapter.{setting} beside {name}", str(error), "set one that does") from None
        model.set_submodule(name, module)
    for name in also:
        p = parameters[name]
        p.data = p.data.to(wide(p))  # small steps would be lost in bfloat16
        p.requires_grad_(True)
    for name, chosen in chosen_rows(config, parameters).items():
        model.set_submodule(name, stand_in(model.get_submodule(name), chosen))
    if start is not None:
        _take(model, start, adapted)
    return adapted


def _adapted(
    base: nn.Linear,
    config: "AdapterConfig",
    generator: torch.Generator,
    original: Tensor | None,
    parts: Mapping[str, Tensor] | None,
) -> AdaptedLinear:
    """What takes the place of a matrix; of a packed one that something is taken out of, the rest is packed again."""
    make = method(config)
    packed: Any = base.weight
    takes_out = make.frozen is not AdaptedLinear.frozen
    again = takes_out and isinstance(packed, Packed)
    if again:
        weight = packed.unpacked() if original is None else original.to(packed.device, torch.float32)
        base = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
    module = make(base, config, generator) if parts is None else make.continued(base, config, parts)
    if again:
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


_OTHER = "set targets, layers and also to what it was trained with"


def _under(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a module has of these, by its own names."""
    within = (name.rpartition(".") for name in tensors)
    return {part: tensors[f"{owner}.{part}"] for owner, _, part in within if owner == module}


@torch.no_grad()
def _take(model: nn.Module, start: Mapping[str, Tensor], adapted: Sequence[str]) -> None:
    """Set what is trained beside the adapted matrices, which have theirs.

    Raises:
        InputError: as `attach`.
    """
    trained = trained_state(model)
    start = dict(start)
    for module in _OF_TOKENS:  # trained whole, and saved as the rows that changed
        if f"{module}.weight" in trained and f"{module}.values" in start:
            parts = {part: start.pop(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in start}
            try:
                check(trained[f"{module}.weight"].shape, parts)
                start[f"{module}.weight"] = placed(trained[f"{module}.weight"], parts)
            except ValueError as error:
                raise InputError(f"adapter.load: {module}", str(error), _OTHER) from None
    faults = {"it lacks": trained.keys() - start.keys(), "it has": start.keys() - trained.keys()}
    for fault, names in faults.items():
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rule = "these settings train it" if fault == "it lacks" else "these settings do not train it"
            raise InputError(f"adapter.load: {fault} {listed}", rule, _OTHER)
    inside = set(adapted)
    for name, x in trained.items():
        if name.rpartition(".")[0] not in inside:
            given = start[name]
            if x.shape != given.shape:
                raise InputError(
                    f"adapter.load: {name} is {tuple(given.shape)}", f"it must be {tuple(x.shape)}", _OTHER
                )
            if not x.is_floating_point() and not torch.equal(x.cpu(), given.cpu()):
                raise InputError(f"adapter.load: {name} are other ones", "these settings train others", _OTHER)
            x.copy_(given)


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
    also = _matching("also", [x for x in config.also if not _ROWS.fullmatch(x)], there)
    twice = sorted({f"{name}.weight" for name in adapted} & set(also))
    if twice:
        raise InputError(
            f"adapter.also has {twice[0]}",
            "that matrix is adapted",
            "leave it to adapter.targets, or take it out there",
        )
    return adapted, also + [name for name in tensors if inner(name) in tuned_state.PARTS[config.state]]


_OF_TOKENS = ("emb", "head")
_ROWS = re.compile(r"(emb|head)\.weight\[(.+)\]")


def chosen_rows(config: "AdapterConfig", tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Rows that `also` names, as in emb.weight[65530-65535], of the embedding and the head; ascending.

    Args:
        config: the method.
        tensors: a model's, by their names in a checkpoint.

    Raises:
        InputError: there are no such rows, or all of the matrix is trained too.
    """
    chosen: dict[str, set[int]] = {}
    for pattern in config.also:
        if found := _ROWS.fullmatch(pattern):
            name = f"{found[1]}.weight"
            if name in select(config, tensors)[1]:
                raise InputError(f"adapter.also has {pattern}", f"{name} is trained whole", "leave one of them out")
            count = len(tensors[name])
            chosen.setdefault(found[1], set()).update(numbers(found[2], count, f"adapter.also: {name}", "rows"))
    return {module: sorted(found) for module, found in chosen.items()}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned, by name: the parameters that require gradients; and what a merge needs beside them."""
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear | Rows))
    kept = {f"{name}.{part}" for name, m in modules for part in m.KEPT}
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
    """The layers that "all" or "0-3 25-31" means; see `numbers`."""
    return numbers(text, count, setting, "layers")


def numbers(text: str, count: int, setting: str, of: str) -> range | list[int]:
    """The numbers that "all" or "0-3 25-31" means.

    Args:
        text: numbers and ranges, or "all".
        count: how many there are in the model.
        setting: what the text is the value of, for messages.
        of: what is numbered.

    Raises:
        InputError: the model has no such number, or the text is no such list.
    """
    if text == "all":
        return range(count)
    chosen: list[int] = []
    for item in text.split():
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        some = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not some or some[-1] >= count:
            raise InputError(
                f"{setting} has {item}",
                f"the model's {of} are 0 to {count - 1}",
                "name some of these as in 0-3 7, or all",
            )
        chosen += some
    return chosen
