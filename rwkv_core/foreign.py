"""Adapters that other programs have written: RWKV-PEFT, old and new, RWKV-LM-LoRA, Hugging Face's peft.

Names and shapes tell the method, its rank and what it works on. Alpha is in no .pth, and has to be asked for; the base that it
was trained on can't be known.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.adapters import inner, layer, peft
from rwkv_core.adapters.linear import wide
from rwkv_core.config import AdapterConfig, BatConfig, BoneConfig, LoraConfig, PeftConfig, PissaConfig
from rwkv_core.errors import InputError
from rwkv_core.formats import container

_NAMES = {"bone": "disha", "miss_block": "disha"}
"""What Bone's matrix was called before RWKV-PEFT called it disha, and is in Hugging Face's peft."""

_PARTS = ("lora_A", "lora_B", "init_lora_A", "init_lora_B", "disha")


def read(path: Path, alpha: float | None = None, init: Path | None = None) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The tensors under our names, and the method.

    Args:
        path: a file, or Hugging Face's folder, whose adapter_config.json has the alpha.
        alpha: of a LoRA, where the file does not have it.
        init: RWKV-PEFT's init_pissa.pth, which makes a PiSSA of what looks like a LoRA.

    Raises:
        InputError: it can't be read or is no adapter; alpha is missing, or has no meaning; or it is of a method that is not
            known.
    """
    about: dict[str, Any] = {}
    if path.is_dir():
        config = path / "adapter_config.json"
        if not config.is_file():
            raise InputError(str(path), "it has no adapter_config.json", "give an adapter's file or folder")
        about, path = json.loads(config.read_text(encoding="utf-8")), path / "adapter_model.safetensors"
        if _by_its_library(about):
            return _of_its_library(path, about)
        _refuse_others(config, about)
    tensors = _named(path) | (_named(init) if init is not None else {})
    states = {name for name in tensors if name.endswith(".time_state")}
    if any(bool(tensors[name].any()) for name in states):
        raise InputError(
            f"{path}: {min(states)}", "it is a tuned state, which is not merged", "mount it beside the model"
        )
    tensors = {name: x for name, x in tensors.items() if name not in states}  # untrained ones, as of early 2025
    parts = {name: x for name, x in tensors.items() if name.rpartition(".")[2] in _PARTS}
    if not parts:
        raise InputError(str(path), "no tensor in it is an adapter's", "give an adapter's file")
    return tensors, _config(path, tensors, parts, about, alpha)


def _by_its_library(about: Mapping[str, Any]) -> bool:
    """Whether none of our methods is that of a folder of Hugging Face's peft."""
    kind = about.get("peft_type")
    return kind not in ("LORA", "MISS") or bool(about.get("use_dora")) or about.get("init_weights") in ("bat", "mini")


def _of_its_library(path: Path, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The tensors of such a folder under our names, and the method, by the library's own layers."""
    where = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")  # the tensors' names say it
    settings = peft.settings({name: x for name, x in about.items() if name not in where})
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name, x in container.read(path).items():
        found = re.fullmatch(r"(blocks\.\d+\.\w+\.\w+)\.(.+)", checkpoint.stripped(name))
        if found is None:
            raise InputError(f"{path}: {name}", "it is beside no matrix of a block", "merge it with peft itself")
        modules.add(found[1])
        tensors[f"{found[1]}.{peft.part_name(found[2])}"] = x.to(wide(x)) if x.is_floating_point() else x
    return tensors, PeftConfig(
        kind="peft",
        config=settings,
        targets=tuple(sorted({inner(name) for name in modules})),
        layers=" ".join(map(str, sorted({number for name in modules if (number := layer(name)) is not None}))),
        also=(),
        load=None,
    )


def _config(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    about: Mapping[str, Any],
    alpha: float | None,
) -> AdapterConfig:
    """The method of these parts, and what it works on."""
    ends = {name.rpartition(".")[2] for name in parts}
    ranks = {x.shape[0] if name.endswith("_A") else x.shape[1] for name, x in parts.items() if "lora" in name}
    ranks |= {x.shape[-1] if x.ndim == 3 else x.shape[0] for name, x in parts.items() if name.endswith(".disha")}
    axes = {x.ndim for name, x in parts.items() if name.endswith(".disha")}
    if len(ranks) != 1 or len(axes) > 1 or ("disha" in ends and len(ends) > 1):
        raise InputError(
            f"{path}: {', '.join(sorted(ends))} of ranks {sorted(ranks)}",
            "must be of one method and rank",
            "merge each alone",
        )
    (rank,) = ranks
    modules = [name.rpartition(".")[0] for name in parts]
    numbers = sorted({number for name in modules if (number := layer(name)) is not None})
    beside: dict[str, Any] = {
        "rank": rank,
        "targets": tuple(dict.fromkeys(inner(name) for name in modules)),
        "layers": " ".join(map(str, numbers)),
        "load": None,
        "also": tuple(dict.fromkeys(inner(name) for name in tensors if name not in parts)),
    }
    is_lora = "disha" not in ends and not any(end.startswith("init") for end in ends)
    if is_lora:
        alpha = about.get("lora_alpha", alpha)
        if alpha is None:
            raise InputError(
                str(path),
                "a LoRA's alpha is not in its file",
                "say --alpha, as it was trained (RWKV-PEFT: 32, if not set)",
            )
        return LoraConfig(
            kind="lora", alpha=alpha, rank_stabilized=bool(about.get("use_rslora")), dropout=0.0, **beside
        )
    if alpha is not None:
        raise InputError(f"--alpha {alpha:g}", f"{path} is no LoRA: it has none", "leave it out")
    if "disha" not in ends:
        return PissaConfig(kind="pissa", iterations=4, load_init=None, **beside)
    return BatConfig(kind="bat", **beside) if axes == {3} else BoneConfig(kind="bone", **beside)


def _named(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under our names."""
    found = {}
    for name, x in container.read(path).items():
        name = checkpoint.stripped(name)
        module, _, part = name.removesuffix(".weight").rpartition(".")
        known = _NAMES.get(part, part)
        found[f"{module}.{known}" if known in _PARTS else name] = x.to(wide(x))
    return found


def _refuse_others(path: Path, about: Mapping[str, Any]) -> None:
    """What Hugging Face's peft can do with the same names, and means something else."""
    refused = {
        "init_lora_weights": str(about.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")),
        "rank_pattern": bool(about.get("rank_pattern")),
        "alpha_pattern": bool(about.get("alpha_pattern")),
        "modules_to_save": bool(about.get("modules_to_save")),
    }
    for name, bad in refused.items():
        if bad:
            raise InputError(
                f"{path}: {name} = {about.get(name)!r}", "this method is not known here", "merge it with peft itself"
            )
