"""The values that an adapter was left with, as those that another run begins with."""

from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_core import checkpoint, foreign
from rwkv_core.adapters import file, peft
from rwkv_core.config import AdapterConfig, LoraConfig, PeftConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.quantize import Form


def read(config: AdapterConfig, base: Path, base_sha256: str, quantize: Form) -> dict[str, Tensor] | None:
    """What `adapter.load` has, as `adapters.attach` takes it; None where nothing is to be loaded.

    Args:
        config: the method to go on with.
        base: the checkpoint that is trained on.
        base_sha256: its digest.
        quantize: how its matrices are kept.

    Raises:
        InputError: a file can't be read, was trained on another base, or with settings that give its values another meaning.
    """
    path, init = config.load, _init(config)
    if path is None:
        if init is not None:
            raise InputError(f"adapter.load_init = {init}", "it belongs to adapter.load, which is null", "set it too")
        return None
    if not path.exists():
        raise InputError(f"adapter.load = {path}", "there is no such file", "name an adapter, or null to begin anew")
    if config.kind == "state" and file.read_record(path) is None:
        return checkpoint.read(path)  # of any program; `attach` sees whether it is this model's
    if file.read_record(path) is None:
        if config.kind == "pissa" and init is None:
            raise InputError(
                "adapter.load_init is null",
                f"{path} does not tell what was taken out of the matrices",
                "name the init_pissa.pth that was written beside it",
            )
        alpha = config.alpha if isinstance(config, LoraConfig) else None
        tensors, found = foreign.read(path, alpha, init)
        if isinstance(config, LoraConfig) and isinstance(found, LoraConfig) and path.is_file():
            found = found.model_copy(update={"rank_stabilized": config.rank_stabilized})  # as alpha, not in the file
    elif init is not None:
        raise InputError(f"adapter.load_init = {init}", f"{path} has all of it in it", "set it to null")
    else:
        tensors, record = file.read_for(base, base_sha256, path, "set model.base to that one")
        found = record.adapter
        if record.quantize != quantize and not record.made_of:  # what no training made was beside no rounded matrix
            raise InputError(
                f"model.quantize = {quantize}",
                f"{path} was trained with {record.quantize}",
                "set the same to go on from it",
            )
    theirs, ours = _meaning(found), _meaning(config)
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"adapter.{name} = {ours.get(name)}",
                f"{path} was trained with {theirs.get(name)}",
                "set the same to go on from it",
            )
    return tensors


def digests(config: AdapterConfig) -> dict[str, str | None]:
    """Digests of the files that are loaded, by the setting that names them."""
    names = {"load": config.load, "load_init": _init(config)}
    return {name: None if path is None else sha256(path) for name, path in names.items()}


def _init(config: AdapterConfig) -> Path | None:
    return config.load_init if config.kind == "pissa" else None


def _meaning(config: AdapterConfig) -> dict[str, Any]:
    """The settings that say what trained values mean. Dropout doesn't, and names and shapes tell where they belong."""
    if isinstance(config, PeftConfig):
        found = peft.settings(config.config)
        return {"kind": config.kind, "config": {name: x for name, x in found.items() if "dropout" not in name}}
    return {"kind": config.kind} | config.model_dump(include={"rank", "alpha", "rank_stabilized", "dora"})
