"""What a file is: a model, an adapter or a state, of which sizes, by whom and from what, as far as it tells."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_core import checkpoint, foreign, models
from rwkv_core.adapters import file, inner, layer
from rwkv_core.files import sha256
from rwkv_core.formats import gguf
from rwkv_core.formats.tuned_state import for_clients, is_part


def describe(path: Path) -> dict[str, Any]:
    """What the file or folder is, by name; sizes in tokens, channels and bytes.

    Raises:
        InputError: it can't be read, or is nothing of RWKV.
    """
    of_llama = path.suffix == gguf.SUFFIX
    tensors = foreign.named(path) if path.is_file() and not of_llama else {}
    if any(name.endswith(".recurrent_state") for name in tensors):
        tensors = checkpoint.read(path)  # fla's
    parts = {name: x for name, x in tensors.items() if foreign.method(name, x)}
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
        if of_llama:
            found |= gguf.about(path)
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


def _adapter(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of another program's adapter tell."""
    modules = [name.rpartition(".")[0] for name in parts]
    return {
        "is": "an adapter without a record: its base and its alpha are not in it",
        "kind": ", ".join(sorted({str(foreign.method(name, x)) for name, x in parts.items()})),
        "rank": ", ".join(map(str, sorted({foreign.rank(name, x) for name, x in parts.items() if x.ndim > 1}))),
        "targets": ", ".join(sorted({inner(name) for name in modules})),
        "layers": len({layer(name) for name in modules} - {None}),
        "trained as they are": ", ".join(sorted(tensors.keys() - parts.keys())) or "none",
    }
