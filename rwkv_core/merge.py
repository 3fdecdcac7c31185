"""Base and adapters become one ordinary checkpoint."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_core import checkpoint, foreign
from rwkv_core.adapters import (
    chosen_rows,
    file,
    is_matrix,
    layer,
    layer_count,
    layer_numbers,
    method,
    rows,
    select,
)
from rwkv_core.adapters.linear import wide
from rwkv_core.adapters.state import zeros
from rwkv_core.config import AdapterConfig, StateConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.formats import tuned_state
from rwkv_core.quantize import Form, rounded

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
    quantize: Form | None = None
    """How the base's matrices are rounded before the adapter is added. None: as they were in training, if the file says it."""


@torch.no_grad()
def merge(
    base: Path, adapters: Sequence[Part], out: Path, *, layers: str = "all", state: Path | None = None
) -> dict[str, Any]:
    """Write the checkpoint that computes what base and adapters compute together.

    Keys, shapes, order and dtypes are the base's. Each adapter's file says how it is to be merged, and into what; what several
    change of a tensor is added up, in float32. A tuned state can't be merged: it is written beside, for clients to mount.

    Args:
        base: a file or a folder.
        adapters: one or more.
        out: the file to write.
        state: where to write the tuned state, if an adapter has one; one with token shift beside it also, see
            `tuned_state.whole`. None is the name of `out`, ending in .state.pth.
        layers: which blocks take part and how much, as in merge_lora_plus: "0.2*25-31 31". A block that is not named stays the
            base's; one named twice counts as the last says. Tensors that were trained as they are, such as norms, are
            taken whole, whatever the factor before their block.

    Returns:
        The receipt: digests of what went in and came out, state files too; how many matrices were changed, and how many tensors
        replaced.

    Raises:
        InputError: a file can't be read or would be overwritten, an adapter was trained on another base, or does not fit it;
            or `layers` names blocks that are not there.
    """
    taken = {path.resolve() for path in (base, *(part.path for part in adapters))}
    state = state or out.with_suffix(".state.pth")
    for path in (out, state, tuned_state.whole(state)):
        if path.resolve() in taken:
            raise InputError(str(path), "it is read, and would be overwritten", "name another file")
    tensors, digest = checkpoint.read(base), sha256(base)
    start = dict(tensors)  # with the states, of zeros, from which the adapters began
    factors = _factors(layers, tensors)
    shares: dict[str, list[tuple[float, Make]]] = {}
    matrices: set[str] = set()
    entries, records = [], list[file.AdapterRecord | None]()
    alone = len(adapters) == 1 and adapters[0].weight == 1 and layers == "all"
    for part in adapters:
        parts, config, quantize, record = _read(base, digest, part, alone)
        records.append(record)
        start |= zeros(tensors, config.state)
        adapted, replaced = merged(start, parts, config, part.path, quantize)
        for name, make in (adapted | replaced).items():
            factor = _factor(factors, name)
            factor = part.weight * (factor if name in adapted or not factor else 1.0)
            if factor:
                shares.setdefault(name, []).append((factor, make))
                matrices |= {name} & adapted.keys()
        entries.append(
            {
                "path": str(part.path), "sha256": sha256(part.path), "kind": config.kind, "run": record and record.run,
                "base_checked": record is not None and record.base_sha256 is not None, "weight": part.weight,
                "settings": config.model_dump(mode="json"), "quantize": quantize,
            }
        )  # fmt: skip
    checkpoint.write_each(
        out,
        {name: (x.shape, x.dtype) for name, x in tensors.items()},
        (_sum(x, shares.get(name, ())).to(x.dtype) for name, x in checkpoint.one_by_one(tensors)),
    )
    tuned = {name: _sum(x, shares.get(name, ())).to(x.dtype) for name, x in start.items() if name not in tensors}
    return {
        "base": {"path": str(base), "sha256": digest},
        "adapters": entries,
        "layers": layers,
        "merged": {
            "sha256": sha256(out), "bytes": out.stat().st_size,
            "matrices_changed": len(matrices), "tensors_replaced": len(shares.keys() & tensors.keys()) - len(matrices),
        },
        "states": _write_states(state, tuned, digest, records[0] if len(records) == 1 else None),
    }  # fmt: skip


def merged(
    base: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    config: AdapterConfig,
    adapter: Path,
    quantize: Form = "none",
) -> tuple[dict[str, Make], dict[str, Make]]:
    """The tensors of a base that an adapter changes: matrices, and those that were trained as they are.

    What makes them is given, and not they: all of them in float32 (or the base's precision, where that is higher) are more than
    a model.

    Args:
        base: a model's tensors.
        parts: the adapter's.
        config: its method.
        adapter: its file, for messages.
        quantize: how the frozen matrices were packed in training. Their rounding is part of what the adapter has learned to
            work beside, so it is part of the result.

    Raises:
        InputError: a part does not fit; or, when a matrix is made, those beside it don't.
    """
    try:
        (matrices, also), chosen = select(config, base), chosen_rows(config, base)
    except InputError as error:  # of more layers, or of another version
        raise InputError(f"{adapter}: {error.value}", f"does not fit the base: {error.rule}", error.remedy) from None
    some: dict[str, dict[str, Tensor]] = {module: {} for module in chosen}
    beside: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}
    replaced: dict[str, Make] = {}
    for name, x in parts.items():
        module, _, part = name.rpartition(".")
        if module in beside:
            beside[module][part] = x
        elif part in rows.PARTS and (module in chosen or f"{module}.weight" in also):
            some.setdefault(module, {})[part] = x
        elif name not in also:
            raise _misfit(adapter, name, "the base has no such tensor that its settings adapt or train")
        elif base[name].shape != x.shape:
            raise _misfit(adapter, name, f"is {tuple(x.shape)}; it must be {tuple(base[name].shape)}")
        else:
            replaced[name] = partial(x.to, base[name].device, wide(base[name]), copy=True)
    for module, found in some.items():
        weight = base[f"{module}.weight"]
        try:
            rows.check(weight.shape, found, chosen.get(module))
        except ValueError as error:
            raise _misfit(adapter, module, str(error)) from None
        replaced[f"{module}.weight"] = partial(rows.placed, weight, found)
    for name in also:
        if name not in replaced:
            raise _misfit(adapter, name, "its settings say that it was trained, and it is not there")

    @torch.no_grad()
    def make(module: str) -> Tensor:
        adapted = method(config)
        weight = base[f"{module}.weight"]
        kind = wide(weight)
        found = {part: x.to(weight.device, kind) for part, x in beside[module].items()}
        try:
            frozen = adapted.frozen(weight.to(kind), found, config)
            if quantize != "none":
                frozen = rounded(frozen, quantize).to(kind)
            return adapted.merged(frozen, found, config)
        except ValueError as error:
            raise _misfit(adapter, module, str(error)) from None

    changed: dict[str, Make] = {f"{module}.weight": partial(make, module) for module in beside}
    if quantize != "none":  # what it does not adapt was packed as well
        changed |= {
            name: partial(rounded, x, quantize)
            for name, x in base.items()
            if is_matrix(name, x) and name not in changed
        }
    return changed, replaced


def _write_states(
    path: Path, tuned: Mapping[str, Tensor], base_sha256: str, record: file.AdapterRecord | None
) -> dict[str, dict[str, Any]]:
    """Write what clients mount; if there is more of the state, also the whole of it. Digest and size of each file, by name.

    Each says what it belongs to, as adapters do: an adapter that is nothing but a state.
    """
    files = {path: ("wkv", tuned_state.for_clients(tuned))} if tuned else {}
    if tuned and len(tuned) > len(files[path][1]):
        files[tuned_state.whole(path)] = ("wkv and token shift", dict(tuned))
    for where, (kind, tensors) in files.items():
        config = StateConfig.model_validate({"kind": "state", "state": kind, "layers": "all", "also": (), "load": None})
        about = file.AdapterRecord(
            format=1,
            adapter=config,
            base_sha256=base_sha256,
            data_sha256=record and record.data_sha256,
            vocabulary_sha256=record and record.vocabulary_sha256,
            run=record and record.run,
        )
        file.write(where, tensors, about)
    return {where.name: {"sha256": sha256(where), "bytes": where.stat().st_size} for where in files}


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


def _read(
    base: Path, digest: str, part: Part, alone: bool
) -> tuple[dict[str, Tensor], AdapterConfig, Form, file.AdapterRecord | None]:
    """An adapter's tensors, method, how the base is rounded, and record; another program's has none: its base can't be checked.

    Only one that is taken whole, and alone, has what it was trained beside: any sum is made with the exact base.
    """
    if part.quantize not in (None, "none") and not alone:
        raise InputError(
            f"--quantize {part.quantize}",
            "a base is rounded for one whole adapter",
            "leave it out, or merge each alone",
        )
    if part.path.is_dir() or file.read_record(part.path) is None:
        return *foreign.read(part.path, part.alpha, part.init), part.quantize or "none", None
    if part.alpha is not None or part.init is not None:
        raise InputError(
            str(part.path), "its alpha and all else are in its record", "leave --alpha and --pissa-init out"
        )
    tensors, record = file.read_for(base, digest, part.path, "merge it into that one")
    return tensors, record.adapter, part.quantize or (record.quantize if alone else "none"), record


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
