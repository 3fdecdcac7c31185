"""Base and adapter become one ordinary checkpoint."""

from pathlib import Path
from typing import Any

import torch

from rwkv_core import checkpoint
from rwkv_core.adapters import file, lora
from rwkv_core.errors import InputError
from rwkv_core.files import sha256


@torch.no_grad()
def merge(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint that computes what base and adapter compute together.

    The sums are made in float32 and stored in the base's dtype; keys, shapes and order are the base's. The adapter's file says
    how it is to be merged, and into what.

    Returns:
        The receipt: digests of what went in and came out, and the matrices changed.

    Raises:
        InputError: a file can't be read, the adapter was trained on another base, or does not fit it.
    """
    deltas, record = file.read_for(base, adapter, "merge it into that one")
    tensors = checkpoint.read(base)
    modules = sorted({name.rsplit(".", 1)[0] for name in deltas})
    for module in modules:
        weight = tensors.get(f"{module}.weight")
        delta = lora.delta(deltas, module, record.adapter)
        if weight is None or delta is None or weight.shape != delta.shape:
            raise InputError(
                f"{adapter}: {module}", "does not fit the base's matrix of that name", "train the adapter anew"
            )
        tensors[f"{module}.weight"] = (weight.float() + delta).to(weight.dtype)
    checkpoint.write(out, tensors)
    return {
        "base": {"path": str(base), "sha256": record.base_sha256},
        "adapter": {"path": str(adapter), "sha256": sha256(adapter), "kind": record.adapter.kind, "run": record.run},
        "merged": {"sha256": sha256(out), "bytes": out.stat().st_size, "matrices_changed": len(modules)},
    }
