"""What a file is: a model, an adapter or a state, of which sizes, by whom and from what, as far as it tells."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_core import checkpoint, models
from rwkv_core.adapters import file
from rwkv_core.files import sha256
from rwkv_core.formats import container
from rwkv_core.formats.tuned_state import for_clients, is_part

# Ends of names in adapters, ours and others', without ".weight": the method of each, and which axis has the rank.
_PARTS = {
    "lora_A": ("LoRA", 0), "lora_B": ("LoRA", 1), "init_lora_A": ("PiSSA", 0), "init_lora_B": ("PiSSA", 1),
    "disha": ("Bone", 0), "bone": ("Bone", 0), "miss_block": ("MiSS of Hugging Face's peft", 0),
}  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """What the file or folder is, by name; sizes in tokens, channels and bytes.

    Raises:
        InputError: it can't be read, or is nothing of RWKV.
    """
    tensors = {checkpoint.stripped(name): x for name, x in container.read(path).items()} if path.is_file() else {}
    parts = {name: x for name, x in tensors.items() if _part(name) in _PARTS}
    states, of_states = for_clients(tensors), [name for name in tensors if is_part(name)]
    record = file.read_record(path) if path.is_file() else None
    if record is not None:
        about = record.model_dump(mode="json", exclude={"format"})
        found = {"is": "an adapter of RWKV-Flow", **about.pop("adapter"), **about}
        if record.adapter.state != "none":
            found["is"] += ", with a tuned state" if record.adapter.kind != "state" else ": a tuned state"
    elif parts:
        found = _adapter(tensors, parts)
    elif states and len(of_states) == len(tensors):
        heads, size = next(iter(states.values())).shape[-3:-1]
        found = {"is": "a tuned state", "n_layer": len(states), "n_embd": heads * size, "head_size": size}
        if len(states) < len(tensors):
            found["is"] += " with token shift, which RWKV-Flow alone mounts"
    else:
        tensors = checkpoint.read(path)
        shape = models.version_of(tensors, path).shape_of(tensors, models.divisor(path))
        found = {"is": f"a model, RWKV-{shape.version}", **asdict(shape)}
        del found["version"]
        if states:
            found["tuned states"] = (
                f"of {len(states)} blocks; RWKV-7's clients read them from a file of their own alone"
            )
    dtypes = Counter(str(x.dtype).removeprefix("torch.") for x in tensors.values())
    return {
        **found,
        "tensors": f"{len(tensors)}, {', '.join(f'{count} {name}' for name, count in dtypes.most_common())}",
        "parameters": sum(x.numel() for x in tensors.values()),
        "sha256": sha256(path),
    }


def _part(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _adapter(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of another program's adapter tell."""
    kinds, ranks, targets = set(), set(), set()
    for name, x in parts.items():
        kind, axis = _PARTS[_part(name)]
        kinds.add("Bat" if kind == "Bone" and x.ndim == 3 else kind)
        ranks.add(x.shape[1] if x.ndim == 3 else x.shape[axis])
        targets.add(name.removesuffix(".weight").rpartition(".")[0].split(".", 2)[-1])
    layers = {name.split(".")[1] for name in parts if name.startswith("blocks.")}
    return {
        "is": "an adapter without a record: its base and its alpha are not in it",
        "kind": ", ".join(sorted(kinds)),
        "rank": ", ".join(map(str, sorted(ranks))),
        "targets": ", ".join(sorted(targets)),
        "layers": len(layers),
        "trained as they are": ", ".join(sorted(tensors.keys() - parts.keys())) or "none",
    }
