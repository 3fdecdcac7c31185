"""Adapters that other programs have written: RWKV-PEFT, old and new, RWKV-LM-LoRA, Hugging Face's peft.

Names and shapes tell the method, its rank and what it works on. Alpha is in no .pth, and has to be asked for; the base that it
was trained on can't be known.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.adapters import inner, layer, peft
from rwkv_core.adapters.linear import wide
from rwkv_core.config import AdapterConfig, BatConfig, BoneConfig, LoraConfig, PeftConfig, PissaConfig
from rwkv_core.errors import InputError
from rwkv_core.formats import container

_TENSORS = "adapter_model.safetensors"
"""Beside Hugging Face's adapter_config.json."""

_ELSEWHERE = "merge it with peft itself"

_NAMES = {"bone": "disha", "miss_block": "disha"}
"""What Bone's matrix was called before RWKV-PEFT called it disha, and is in Hugging Face's peft."""

_RANK = {"lora_A": 0, "lora_B": 1, "init_lora_A": 0, "init_lora_B": 1, "disha": 0}
"""Parts of adapters, by the end of the name, and which of their axes the rank is; of three axes, it is the last."""

_LENGTHS = "lora_magnitude_vector"
"""DoRA's part, which has no rank."""


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
    folder = path if path.is_dir() else path.parent
    config = folder / "adapter_config.json"
    if path.is_dir() or (path.name == _TENSORS and config.is_file()):
        about, path = _settings(config), folder / _TENSORS
        if _by_its_library(about):
            return _of_its_library(path, about)
        _refuse_others(config, about)
    tensors = named(path) | (named(init) if init is not None else {})
    states = {name for name in tensors if name.endswith(".time_state")}
    if any(bool(tensors[name].any()) for name in states):
        raise InputError(
            f"{path}: {min(states)} {tuple(tensors[min(states)].shape)}",
            "a tuned state is what a model begins with: it is no part of the model's file, and is not merged",
            "keep both files, and choose both where the model runs: rwkvflow chat --state, RWKV Runner's State Model, "
            "[[state]] in Ai00's Config.toml",
        )
    tensors = {name: x for name, x in tensors.items() if name not in states}  # untrained ones, as of early 2025
    parts = {name: x for name, x in tensors.items() if method(name, x)}
    if not parts:
        raise InputError(str(path), "no tensor in it is an adapter's", "give an adapter's file")
    try:
        return tensors, _config(path, tensors, parts, about, alpha)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"{path}: {first['loc'][-1]} is {first['input']!r}", first["msg"], "say what it was trained with"
        ) from None


def named(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under our names.

    Raises:
        InputError: it can't be read; or it is of Hugging Face's MiSS in its mode "bat", whose shapes are those of our Bat.
    """
    found = {}
    for name, x in container.read(path).items():
        name = checkpoint.stripped(name)
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "miss_block" and x.ndim == 3:
            raise InputError(f"{path}: {name} {tuple(x.shape)}", 'MiSS in its mode "bat" is not known here', _ELSEWHERE)
        known = _NAMES.get(part, part)
        found[f"{module}.{known}" if known in _RANK or known == _LENGTHS else name] = x
    return found


def method(name: str, x: Tensor) -> str | None:
    """Of what kind an adapter is that has this tensor, under our name: lora, pissa, bone or bat; None: it is no part of one."""
    part = name.rpartition(".")[2]
    if part == _LENGTHS:
        return "lora"
    if part not in _RANK or x.ndim not in (2, 3):
        return None
    if part != "disha":
        return "pissa" if part.startswith("init") else "lora"
    return "bat" if x.ndim == 3 else "bone"


def rank(name: str, x: Tensor) -> int:
    """Of a part of an adapter, under our name."""
    return x.shape[-1 if x.ndim == 3 else _RANK[name.rpartition(".")[2]]]


def _by_its_library(about: Mapping[str, Any]) -> bool:
    """Whether none of our methods is that of a folder of Hugging Face's peft."""
    kind = about.get("peft_type")
    return kind not in ("LORA", "MISS") or about.get("init_weights") in ("bat", "mini")


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
        state="none",
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
    kinds = {str(method(name, x)) for name, x in parts.items()}
    dora = any(name.endswith(_LENGTHS) for name in parts)
    ranks = {rank(name, x) for name, x in parts.items() if x.ndim > 1}
    if len(ranks) != 1 or kinds not in ({"lora"}, {"lora", "pissa"}, {"pissa"}, {"bone"}, {"bat"}):
        raise InputError(
            f"{path}: {', '.join(sorted(kinds))} of ranks {sorted(ranks)}",
            "must be of one method and rank",
            "merge each alone",
        )
    if about.get("r", min(ranks)) not in ranks:
        raise InputError(
            f"{path}: adapter_config.json says r = {about['r']}",
            f"its tensors are of rank {min(ranks)}",
            "copy it again",
        )
    modules = [name.rpartition(".")[0] for name in parts]
    numbers = sorted({number for name in modules if (number := layer(name)) is not None})
    beside: dict[str, Any] = {
        "rank": ranks.pop(),
        "targets": tuple(dict.fromkeys(inner(name) for name in modules)),
        "layers": " ".join(map(str, numbers)),
        "load": None,
        "also": tuple(dict.fromkeys(inner(name) for name in tensors if name not in parts)),
        "state": "none",
    }
    if kinds == {"lora"}:
        alpha = about.get("lora_alpha", alpha)
        if alpha is None:
            raise InputError(
                str(path),
                "a LoRA's alpha is not in its file",
                "say --alpha, as it was trained (RWKV-PEFT: 32, if not set)",
            )
        return LoraConfig(
            kind="lora",
            alpha=alpha,
            rank_stabilized=bool(about.get("use_rslora")),
            dropout=0.0,
            dora=dora,
            **beside,
        )
    if alpha is not None:
        raise InputError(f"--alpha {alpha:g}", f"{path} is no LoRA: it has none", "leave it out")
    if "pissa" in kinds:
        return PissaConfig(kind="pissa", iterations=4, load_init=None, **beside)
    return BatConfig(kind="bat", **beside) if kinds == {"bat"} else BoneConfig(kind="bone", **beside)


def _settings(path: Path) -> dict[str, Any]:
    """What Hugging Face's adapter_config.json says.

    Raises:
        InputError: it is not there, or can't be read.
    """
    if not path.is_file():
        raise InputError(str(path.parent), "it has no adapter_config.json", "give an adapter's file or folder")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), f"must be JSON: {error}", "copy the folder again") from None
    if not isinstance(about, dict):
        raise InputError(f"{path} is a {type(about).__name__}", "must name settings", "copy the folder again")
    return about


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
            raise InputError(f"{path}: {name} = {about.get(name)!r}", "this method is not known here", _ELSEWHERE)
