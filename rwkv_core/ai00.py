"""An adapter as Ai00 and web-rwkv mount it beside its base: pairs of low rank, in a .st of their own.

For each matrix of a block W + alpha / rank * B A: A (rank, in) is in the file as name.lora.0 turned around, B (out, rank) as
name.lora.1, and alpha in Ai00's configuration. A vector in the file takes the place of the base's.
Source: cryscan/web-rwkv, src/runtime/loader.rs (LoraBlend::full) and src/shaders/blend_lora.wgsl.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core import checkpoint, models
from rwkv_core.adapters import file, lora
from rwkv_core.config import AdapterConfig, BoneConfig, LoraConfig, PissaConfig
from rwkv_core.conformance.check import Checked, Expected, Mode, Subject, check
from rwkv_core.errors import InputError
from rwkv_core.files import sha256, whole_file
from rwkv_core.formats import container, tuned_state, web_rwkv
from rwkv_core.merge import merged

LORA, RECIPE, STATE = "lora.st", "lora.toml", "lora.state"

_MATRIX = re.compile(r"blocks\.\d+\.(att|ffn)\.(key|value|receptance|gate|output)")
"""What alpha is applied to."""
_ROW = 4  # values that a shader reads at once: the rank is filled up to a multiple of it
_PARTS = ("lora_A", "lora_B", "init_lora_A", "init_lora_B", "disha")
_WHY_NOT = {
    "dora": "DoRA gives every row a length: that is no sum of a low rank",
    "bat": "Bat's change depends on the matrix: that is no sum of a low rank",
    "full": "all of the model was trained",
    "peft": "which form it has, the peft package alone knows",
    "state": "it has a tuned state and no matrices",
}


@torch.no_grad()
def export(adapter: Path, out: Path, base: Path | None = None) -> dict[str, Any]:
    """Write an adapter for Ai00 into the folder `out`: the file, a recipe for its configuration, its tuned state if it has one.

    Args:
        adapter: of RWKV-Flow: a LoRA; a Bone or PiSSA, which are sums of a low rank too.
        out: the folder.
        base: the model that it was trained on, whose sizes a Bone's file does not have. None of it is written.

    Returns:
        The adapter's digest, each file's digest and size, alpha, and the largest rank.

    Raises:
        InputError: the adapter can't be read, or is no sum of low rank beside an exact base.
        WorldError: there is no room, or no permission.
    """
    tensors, record = file.read(adapter)
    config = record.adapter
    _refuse(config)
    if isinstance(config, BoneConfig) and base is None:
        raise InputError(f"ai00 of {adapter}", "how wide its matrices are, a Bone's base alone says", "give --base")
    wide = {} if base is None else _widths(base, adapter)
    if record.quantize != "none":
        raise InputError(
            f"{adapter}: trained beside a base in {record.quantize}",
            "Ai00 has another, and the adapter makes up for the rounding of that one",
            "merge it, and export the model as st",
        )
    beside, vectors, state = _sorted(tensors)
    converted: dict[str, Tensor] = {}
    pairs = {module: _pair(parts, wide.get(module, 0)) for module, parts in beside.items()}
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    rank += -rank % _ROW
    for module, (a, b) in pairs.items():
        empty = rank - len(a)
        converted[f"{module}.lora.0"] = torch.nn.functional.pad(a, (0, 0, 0, empty)).mT
        converted[f"{module}.lora.1"] = torch.nn.functional.pad(b, (0, empty))
    alpha = _scale(config) * rank
    converted |= web_rwkv.from_official(vectors) if vectors else {}
    if not converted:
        raise InputError(f"{adapter}", "it has nothing that Ai00 mounts as a LoRA", "export its state")
    checkpoint.check_values(converted, torch.float16)
    about = {name: (x.shape, torch.float16) for name, x in converted.items()}
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / LORA) as temporary:
        container.write_safetensors(temporary, about, converted.values())
    with whole_file(out / RECIPE) as temporary:
        temporary.write_text(f'[[lora]]\nalpha = {alpha!r}\npath = "{LORA}"\n', encoding="utf-8")
    files = [LORA, RECIPE]
    if state:
        web_rwkv.write(out / STATE, tuned_state.for_clients(state))
        files.append(STATE)
    return {
        "adapter": {"path": str(adapter), "sha256": sha256(adapter), "kind": config.kind},
        "alpha": alpha,
        "rank": rank,
        "matrices": len(pairs),
        "vectors": len(vectors),
        "files": {name: {"sha256": sha256(out / name), "bytes": (out / name).stat().st_size} for name in files},
    }


@torch.no_grad()
def conform(
    adapter: Path, out: Path, report: Mapping[str, Any], base: Path, mode: Mode, head_size_divisor: float | None = None
) -> list[Checked]:
    """Read the files of an export as web-rwkv does, beside its base, and compare with what the merge makes of that base.

    The base is written as a .st beside `out` for as long as this takes.

    Args:
        adapter: what was exported.
        out: where its files are.
        report: what `export` said of them.
        base: the model that it was trained on.
        mode: whether to compute logits.
        head_size_divisor: as of `models.load`.

    Raises:
        InputError: it was trained on another base, or web-rwkv has no such model.
        WorldError: there is no room, or no permission.
    """
    parts, record = file.read_for(base, sha256(base), adapter, "give that one")
    tensors, tuned = checkpoint.read(base), {name: x for name, x in parts.items() if tuned_state.is_part(name)}
    beside = {name: x for name, x in parts.items() if name not in tuned}
    adapted, replaced = merged(tensors, beside, record.adapter, adapter)
    web_rwkv.check(tensors)
    checkpoint.check_values(tensors, torch.float16)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=out.parent) as folder:
        model = Path(folder) / "base.st"
        web_rwkv.write(model, tensors)
        subjects = [Subject(out / LORA, model, report["alpha"])]
        if STATE in report["files"]:
            subjects.append(Subject(out / STATE, model))
        expected = Expected(
            tensors, tuned_state.for_clients(tuned), head_size_divisor=models.divisor(base, head_size_divisor),
            merged=tensors | {name: make().float() for name, make in (adapted | replaced).items()},
        )  # fmt: skip
        return check(subjects, expected, mode)


def _scale(config: AdapterConfig) -> float:
    return lora.scale(config) if isinstance(config, LoraConfig) else 1.0


def _refuse(config: AdapterConfig) -> None:
    """Raise an InputError for a method whose change is no product of two narrow matrices."""
    if not isinstance(config, LoraConfig | PissaConfig | BoneConfig) or (
        isinstance(config, LoraConfig) and config.dora
    ):
        kind = "dora" if isinstance(config, LoraConfig) else config.kind
        raise InputError(f"ai00 of {kind}", _WHY_NOT[kind], "merge it, and export the model as st")


def _widths(base: Path, adapter: Path) -> dict[str, int]:
    """Inputs of each matrix of the base that the adapter was trained on."""
    file.read_for(base, sha256(base), adapter, "give that one")
    return {name.removesuffix(".weight"): x.shape[1] for name, x in checkpoint.read(base).items() if x.ndim == 2}


def _pair(parts: Mapping[str, Tensor], inputs: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), whose product is what a method adds to a matrix.

    A Bone adds D[j mod rank, o] to W[o, j]: B is D turned around, and A has a 1 where j mod rank is its row.
    """
    if "disha" in parts:
        d = parts["disha"]
        return torch.eye(len(d))[:, torch.arange(inputs) % len(d)], d.mT
    a, b = parts["lora_A"], parts["lora_B"]
    if "init_lora_A" in parts:  # PiSSA's B A - B0 A0
        a = torch.cat([a.float(), parts["init_lora_A"].float()])
        b = torch.cat([b.float(), -parts["init_lora_B"].float()], dim=1)
    return a, b


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Parts beside each matrix, vectors that were trained as they are, and the tuned state.

    Raises:
        InputError: there is something else.
    """
    beside: dict[str, dict[str, Tensor]] = {}
    vectors: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, x in tensors.items():
        module, _, part = name.rpartition(".")
        if tuned_state.is_part(name):
            state[name] = x
        elif _MATRIX.fullmatch(module) and part in _PARTS:
            beside.setdefault(module, {})[part] = x
        elif x.squeeze().ndim <= 1 and name.startswith(("blocks.", "ln_out.")):
            vectors[name] = x
        else:
            raise InputError(
                f"ai00 with {name}",
                "it mounts pairs beside the matrices of a block, and vectors",
                "merge the adapter, and export the model as st",
            )
    return beside, vectors, state
