"""Base and adapter become one ordinary checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.adapters import METHODS, file, select
from rwkv_core.config import AdapterConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256


def merge(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint that computes what base and adapter compute together.

    Keys, shapes, order and dtypes are the base's. The adapter's file says how it is to be merged, and into what.

    Returns:
        The receipt: digests of what went in and came out, how many matrices were changed, and how many tensors replaced.

    Raises:
        InputError: a file can't be read, the adapter was trained on another base, or does not fit it.
    """
    parts, record = file.read_for(base, adapter, "merge it into that one")
    tensors = checkpoint.read(base)
    adapted, replaced = merged(tensors, parts, record.adapter, adapter)
    checkpoint.write(out, tensors | adapted | replaced)
    return {
        "base": {"path": str(base), "sha256": record.base_sha256},
        "adapter": {"path": str(adapter), "sha256": sha256(adapter), "kind": record.adapter.kind, "run": record.run},
        "merged": {
            "sha256": sha256(out), "bytes": out.stat().st_size,
            "matrices_changed": len(adapted), "tensors_replaced": len(replaced),
        },
    }  # fmt: skip


@torch.no_grad()
def merged(
    base: Mapping[str, Tensor], parts: Mapping[str, Tensor], config: AdapterConfig, adapter: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a base that an adapter changes: matrices that it adapts, and those that were trained as they are.

    Sums are made in float32, or in the base's precision where that is higher; the results are of the base's dtype.

    Args:
        base: a model's tensors.
        parts: the adapter's.
        config: its method.
        adapter: its file, for messages.

    Raises:
        InputError: a part does not fit.
    """
    matrices, also = select(config, base)
    beside: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}
    replaced: dict[str, Tensor] = {}
    for name, x in parts.items():
        module, _, part = name.rpartition(".")
        if module in beside:
            beside[module][part] = x
        elif name not in also:
            raise _misfit(adapter, name, "the base has no such tensor that its settings adapt or train")
        elif base[name].shape != x.shape:
            raise _misfit(adapter, name, f"is {tuple(x.shape)}; it must be {tuple(base[name].shape)}")
        else:
            replaced[name] = x.to(base[name])
    for name in also:
        if name not in replaced:
            raise _misfit(adapter, name, "its settings say that it was trained, and it is not there")
    adapted: dict[str, Tensor] = {}
    for module, found in beside.items():
        weight = base[f"{module}.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        parts = {part: x.to(weight.device, wide) for part, x in found.items()}
        try:
            y = METHODS[config.kind].merged(weight.to(wide), parts, config)
        except ValueError as error:
            raise _misfit(adapter, module, str(error)) from None
        adapted[f"{module}.weight"] = y.to(weight.dtype)
    return adapted, replaced


def _misfit(adapter: Path, name: str, reason: str) -> InputError:
    return InputError(f"{adapter}: {name}", f"does not fit the base: {reason}", "train the adapter anew")
