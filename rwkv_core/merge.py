"""Base and adapters become one ordinary checkpoint."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_core import checkpoint, foreign
from rwkv_core.adapters import METHODS, file, layer, layer_count, layer_numbers, select
from rwkv_core.adapters.linear import wide
from rwkv_core.config import AdapterConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256

Make = Callable[[], Tensor]
"""Makes a tensor, and keeps no hold of it."""


class Part(NamedTuple):
    """An adapter, and how much of what it changes is taken: 1 is all of it."""

    path: Path
    weight: float = 1.0
    alpha: float | None = None
    """Of another program's LoRA; see `foreign.read`."""
    init: Path | None = None
    """RWKV-PEFT's init_pissa.pth of another program's PiSSA."""


@torch.no_grad()
def merge(base: Path, adapters: Sequence[Part], out: Path, *, layers: str = "all") -> dict[str, Any]:
    """Write the checkpoint that computes what base and adapters compute together.

    Keys, shapes, order and dtypes are the base's. Each adapter's file says how it is to be merged, and into what; what several
    change of a tensor is added up, in float32.

    Args:
        base: a file or a folder.
        adapters: one or more.
        out: the file to write.
        layers: which blocks take part and how much, as in merge_lora_plus: "0.2*25-31 31". A block that is not named stays the
            base's; one named twice counts as the last says. Tensors that were trained as they are, such as norms, are
            taken whole, whatever the factor before their block.

    Returns:
        The receipt: digests of what went in and came out, how many matrices were changed, and how many tensors replaced.

    Raises:
        InputError: a file can't be read or would be overwritten, an adapter was trained on another base, or does not fit it;
            or `layers` names blocks that are not there.
    """
    taken = {path.resolve() for path in (base, *(part.path for part in adapters))}
    if out.resolve() in taken:
        raise InputError(str(out), "it is read, and would be overwritten", "name another file")
    tensors, digest = checkpoint.read(base), sha256(base)
    factors = _factors(layers, tensors)
    shares: dict[str, list[tuple[float, Make]]] = {}
    matrices: set[str] = set()
    entries = []
    for part in adapters:
        parts, config, record = _read(base, digest, part)
        adapted, replaced = merged(tensors, parts, config, part.path)
        for name, make in (adapted | replaced).items():
            factor = _factor(factors, name)
            factor = part.weight * (factor if name in adapted or not factor else 1.0)
            if factor:
                shares.setdefault(name, []).append((factor, make))
                matrices |= {name} & adapted.keys()
        entries.append(
            {
                "path": str(part.path), "sha256": sha256(part.path), "kind": config.kind, "run": record and record.run,
                "base_checked": record is not None, "weight": part.weight, "settings": config.model_dump(mode="json"),
            }
        )  # fmt: skip
    checkpoint.write_each(
        out,
        {name: (x.shape, x.dtype) for name, x in tensors.items()},
        (_sum(x, shares.get(name, ())).to(x.dtype) for name, x in checkpoint.one_by_one(tensors)),
    )
    return {
        "base": {"path": str(base), "sha256": digest},
        "adapters": entries,
        "layers": layers,
        "merged": {
            "sha256": sha256(out), "bytes": out.stat().st_size,
            "matrices_changed": len(matrices), "tensors_replaced": len(shares) - len(matrices),
        },
    }  # fmt: skip


def merged(
    base: Mapping[str, Tensor], parts: Mapping[str, Tensor], config: AdapterConfig, adapter: Path
) -> tuple[dict[str, Make], dict[str, Make]]:
    """The tensors of a base that an adapter changes: matrices that it adapts, and those that were trained as they are.

    What makes them is given, and not they: all of them in float32 (or the base's precision, where that is higher) are more than
    a model.

    Args:
        base: a model's tensors.
        parts: the adapter's.
        config: its method.
        adapter: its file, for messages.

    Raises:
        InputError: a part does not fit; or, when a matrix is made, those beside it don't.
    """
    try:
        matrices, also = select(config, base)
    except InputError as error:  # of more layers, or of another version
        raise InputError(f"{adapter}: {error.value}", f"does not fit the base: {error.rule}", error.remedy) from None
    beside: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}
    replaced: dict[str, Make] = {}
    for name, x in parts.items():
        module, _, part = name.rpartition(".")
        if module in beside:
            beside[module][part] = x
        elif name not in also:
            raise _misfit(adapter, name, "the base has no such tensor that its settings adapt or train")
        elif base[name].shape != x.shape:
            raise _misfit(adapter, name, f"is {tuple(x.shape)}; it must be {tuple(base[name].shape)}")
        else:
            replaced[name] = partial(x.to, base[name].device, wide(base[name]), copy=True)
    for name in also:
        if name not in replaced:
            raise _misfit(adapter, name, "its settings say that it was trained, and it is not there")

    @torch.no_grad()
    def make(module: str) -> Tensor:
        weight = base[f"{module}.weight"]
        kind = wide(weight)
        found = {part: x.to(weight.device, kind) for part, x in beside[module].items()}
        try:
            return METHODS[config.kind].merged(weight.to(kind), found, config)
        except ValueError as error:
            raise _misfit(adapter, module, str(error)) from None

    return {f"{module}.weight": partial(make, module) for module in beside}, replaced


def _sum(base: Tensor, shares: Sequence[tuple[float, Make]]) -> Tensor:
    """The base and what is taken of each change to it; one that is taken whole and alone, to the bit."""
    if not shares:
        return base
    if len(shares) == 1 and shares[0][0] == 1:
        return shares[0][1]()
    total = base.to(wide(base), copy=True)
    for factor, make in shares:
        change = make()
        change -= base
        total += change.mul_(factor)
    return total


def _read(base: Path, digest: str, part: Part) -> tuple[dict[str, Tensor], AdapterConfig, file.AdapterRecord | None]:
    """An adapter's tensors, method and record; another program's has none, and its base can't be checked."""
    if part.path.is_dir() or file.read_record(part.path) is None:
        return *foreign.read(part.path, part.alpha, part.init), None
    if part.alpha is not None or part.init is not None:
        raise InputError(
            str(part.path), "its alpha and all else are in its record", "leave --alpha and --pissa-init out"
        )
    tensors, record = file.read_for(base, digest, part.path, "merge it into that one")
    return tensors, record.adapter, record


def _misfit(adapter: Path, name: str, reason: str) -> InputError:
    return InputError(f"{adapter}: {name}", f"does not fit the base: {reason}", "train the adapter anew")


def _factors(text: str, tensors: Mapping[str, Tensor]) -> dict[int, float]:
    """How much of each block is taken; those that are not here, nothing."""
    count = layer_count(tensors)
    factors: dict[int, float] = {}
    for item in text.split():
        found = re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\*)?(.+)", item)
        factor, layers = (found[1], found[2]) if found else (None, item)
        factors |= dict.fromkeys(layer_numbers(layers, count, "layers"), float(factor or 1))
    return factors


def _factor(factors: Mapping[int, float], name: str) -> float:
    """For a tensor of that name; what is outside of any block is taken whole."""
    number = layer(name)
    return 1.0 if number is None else factors.get(number, 0.0)
