"""Runs the official `rwkv` package, which RWKV Runner has inside, on a .pth. Only ever in a process of its own.

The package reads RWKV_V7_ON and its like when it is imported, so a process is for RWKV-7, or for the versions before it.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rwkv_core.conformance.contents import Array


def name() -> str:
    """What the verdict calls it."""
    return f"rwkv {version('rwkv')}"


def environment(of_version: str) -> dict[str, str]:
    """What must be set before it is imported."""
    return {"RWKV_V7_ON": "1" if of_version == "7" else "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}


def logits(path: Path, prompts: Sequence[Sequence[int]], states: Mapping[str, Array] | None) -> list[Array]:
    """(T, V) for each prompt, in float32 on the CPU.

    Args:
        path: a .pth.
        prompts: token ids.
        states: the tensors of a state file, (H, N, N) a block, rows are values; mounted as RWKV Runner does.
    """
    import torch
    from rwkv.model import RWKV  # type: ignore[import-untyped]

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    name = str(path) if path.suffix != ".pth" else str(path.with_suffix(""))
    model = RWKV(model=name, strategy="cpu fp32")
    of_7 = os.environ.get("RWKV_V7_ON") == "1"
    found = []
    with torch.no_grad():
        for prompt in prompts:
            state = None
            if states:
                state = _mounted(model, states, of_7)
            seen, _ = model.forward(list(prompt), state, full_output=True)
            found.append(seen.reshape(-1, seen.shape[-1]).float().numpy())
    return found


def _mounted(model, states: Mapping[str, Array], of_7: bool) -> list:  # type: ignore[no-untyped-def, type-arg]
    """The package's state with the tuned matrices in it: those before RWKV-7 have rows that are keys."""
    import torch

    mounted = []
    for i in range(model.args.n_layer):
        matrix = torch.from_numpy(states[f"blocks.{i}.att.time_state"].copy()).float()
        shift = torch.zeros(model.args.n_embd)
        mounted += [shift, matrix if of_7 else matrix.transpose(1, 2).contiguous(), shift.clone()]
    return mounted
