"""Small adapters in every layout that is read, and what each merges to.

They lie in tests/golden/adapters; `PYTHONPATH=. python tests/golden_adapters.py` writes them anew. Names and shapes are those
of the programs named below. The formulas are written out here, one sum at a time, and share nothing with rwkv_core. All values
are multiples of 1/16 and at most 1, so that every sum is exact in float32 whatever its order, and equal results are equal bits;
their seed is their name.

Layouts: JL-er/RWKV-PEFT of June 2025 (rwkvt/peft, merge/*.py) and of 2024 (.bone); Joluck/RWKV-PEFT of January 2026, which has
those of huggingface/peft; Blealtan/RWKV-LM-LoRA for RWKV-4.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from rwkv_core.adapters import file
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.config import BatConfig, BoneConfig, FullConfig, LoraConfig, PeftConfig, PissaConfig
from rwkv_core.files import sha256

FOLDER = Path(__file__).parent / "golden" / "adapters"
DIGESTS = FOLDER / "merged.json"

LAYERS, WIDTH, RANK = 2, 8, 4
ALPHA = 8.0


def values(seed: str, *shape: int) -> Tensor:
    """Multiples of 1/16 from -1 to 1, float32."""
    drawn = hashlib.shake_256(seed.encode()).digest(math.prod(shape))
    return torch.tensor([(byte % 33 - 16) / 16 for byte in drawn]).view(shape)


MATRICES_7 = {
    "att.receptance": (WIDTH, WIDTH), "att.key": (WIDTH, WIDTH), "att.value": (WIDTH, WIDTH), "att.output": (WIDTH, WIDTH),
    "ffn.key": (4 * WIDTH, WIDTH), "ffn.value": (WIDTH, 4 * WIDTH),
}  # fmt: skip
MATRICES_4 = {
    "att.key": (WIDTH, WIDTH), "att.value": (WIDTH, WIDTH), "att.receptance": (WIDTH, WIDTH),
    "ffn.key": (4 * WIDTH, WIDTH), "ffn.receptance": (WIDTH, WIDTH), "ffn.value": (WIDTH, 4 * WIDTH),
}  # fmt: skip


def shapes(version: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a base that the layouts speak of, and a few that they don't."""
    c = (WIDTH,)
    norms = {f"ln{i}.{part}": c for i in (1, 2) for part in ("weight", "bias")}
    if version == "7":
        inner = {"att.x_r": (1, 1, WIDTH), "att.r_k": (2, 4), **{f"{m}.weight": s for m, s in MATRICES_7.items()}}
        inner |= {"att.ln_x.weight": c, "att.ln_x.bias": c}
    else:
        inner = {
            "att.time_decay": c,
            "att.time_first": c,
            "att.time_mix_k": (1, 1, WIDTH),
            "att.output.weight": (WIDTH,) * 2,
        }
        inner |= {"ffn.time_mix_k": (1, 1, WIDTH), **{f"{m}.weight": s for m, s in MATRICES_4.items()}}
    blocks = {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in (norms | inner).items()}
    outside = {"ln_out.weight": c, "ln_out.bias": c, "head.weight": (5, WIDTH)}
    return {"emb.weight": (5, WIDTH), "blocks.0.ln0.weight": c, "blocks.0.ln0.bias": c} | blocks | outside


def base(version: str) -> dict[str, Tensor]:
    return {name: values(f"base {version} {name}", *shape) for name, shape in shapes(version).items()}


def beside(version: str, parts: Mapping[str, Any], seed: str = "") -> dict[str, Tensor]:
    """For every matrix the named parts, whose shape is a function of (out, in)."""
    matrices = MATRICES_7 if version == "7" else MATRICES_4
    return {
        f"blocks.{i}.{module}.{part}": values(f"{seed} {i} {module} {part}", *shape(*matrices[module]))
        for i in range(LAYERS)
        for module in matrices
        for part, shape in parts.items()
    }


LORA = {"lora_A": lambda out, into: (RANK, into), "lora_B": lambda out, into: (out, RANK)}
INIT = {f"init_{name}": shape for name, shape in LORA.items()}
BONE = {"disha": lambda out, into: (3, out)}  # 3 divides neither 8 nor 32: the last stretch is shorter
LOHA = {
    f"hada_w{i}_{x}": (lambda out, into: (out, 2)) if x == "a" else (lambda out, into: (2, into))
    for i in (1, 2)
    for x in "ab"
}  # of Hugging Face's peft
BAT = {"disha": lambda out, into: (into // RANK, RANK, RANK)}


def product(b: list[list[float]], a: list[list[float]], row: int, column: int) -> float:
    return sum(b[row][k] * a[k][column] for k in range(len(a)))


def with_lora(w: Any, p: Mapping[str, Any], scale: float) -> Any:
    """W + scale B A."""
    b, a = p["lora_B"], p["lora_A"]
    return [[w[o][j] + scale * product(b, a, o, j) for j in range(len(w[0]))] for o in range(len(w))]


def with_pissa(w: Any, p: Mapping[str, Any]) -> Any:
    """W - B0 A0 + B A."""
    residual = with_lora(w, {"lora_A": p["init_lora_A"], "lora_B": p["init_lora_B"]}, -1.0)
    return with_lora(residual, p, 1.0)


def with_bone(w: Any, p: Mapping[str, Any]) -> Any:
    """W[o, j] + D[j mod r, o]."""
    d = p["disha"]
    return [[w[o][j] + d[j % len(d)][o] for j in range(len(w[0]))] for o in range(len(w))]


def with_bat(w: Any, p: Mapping[str, Any]) -> Any:
    """In blocks of r x r, W[a, b] + W[a, b] D[b] + D[b]."""
    d = p["disha"]
    r = len(d[0])

    def value(o: int, j: int) -> float:
        b, row, column = j // r, o % r, j % r
        turned = sum(w[o][b * r + k] * d[b][k][column] for k in range(r))
        return w[o][j] + turned + d[b][row][column]

    return [[value(o, j) for j in range(len(w[0]))] for o in range(len(w))]


def with_loha(w: Any, p: Mapping[str, Any]) -> Any:
    """W[o, j] + 4 / 2 (A B)[o, j] (C D)[o, j]."""
    a, b, c, d = (p[f"hada_w{i}_{x}"] for i in (1, 2) for x in "ab")
    return [[w[o][j] + 2 * product(a, b, o, j) * product(c, d, o, j) for j in range(len(w[0]))] for o in range(len(w))]


def merged(version: str, tensors: Mapping[str, Tensor], formula: Any) -> dict[str, Tensor]:
    """The base with each matrix as the formula has it, and with what stands in the adapter under the base's own names."""
    found = base(version)
    parts: dict[str, dict[str, Any]] = {}
    for name, x in tensors.items():
        if name in found:
            found[name] = x.float()
        else:
            module, _, part = name.rpartition(".")
            parts.setdefault(f"{module}.weight", {})[part] = x.tolist()
    return found | {name: torch.tensor(formula(found[name].tolist(), p)) for name, p in parts.items()}


class Golden(NamedTuple):
    """An adapter's files, how it is merged, and what it merges to."""

    files: dict[str, Any]
    """By path: tensors, text, or tensors with their method for a file of ours."""

    merged: dict[str, Tensor]
    version: str = "7"
    alpha: float | None = None
    init: str | None = None

    @property
    def path(self) -> str:
        """Of the adapter: its folder, where it has one."""
        first = next(iter(self.files))
        return str(Path(first).parent) if "/" in first else first


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in tensors.items()}


def bfloat16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.bfloat16() for name, x in tensors.items()}


def replaced(version: str, *patterns: str) -> dict[str, Tensor]:
    """Tensors that were trained as they are, which RWKV-PEFT's train_parts chooses by parts of names."""
    wanted = [name for name in shapes(version) if any(pattern in name for pattern in patterns)]
    return {name: values(f"trained {name}", *shapes(version)[name]) for name in wanted}


def hugging_face(about: dict[str, Any], tensors: Mapping[str, Tensor], folder: str) -> dict[str, Any]:
    targets = ["receptance", "key", "value", "output"]
    settings = {"bias": "none", "r": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return {
        f"{folder}/adapter_config.json": json.dumps(settings | about, indent=2, sort_keys=True) + "\n",
        f"{folder}/adapter_model.safetensors": prefixed("base_model.model.", tensors),
    }


def every() -> dict[str, Golden]:
    """All of them, by name."""
    lora, pissa = beside("7", LORA), beside("7", LORA) | beside("7", INIT)
    trained = {name: x for name, x in pissa.items() if "init" not in name}
    init = {name: x for name, x in pissa.items() if "init" in name}
    bone, bat, norms = beside("7", BONE), beside("7", BAT), replaced("7", "ln")
    loha = beside("7", LOHA)
    lora_4 = beside("4", LORA) | replaced("4", "time", "ln")
    states = {f"blocks.{i}.att.time_state": torch.zeros(2, 4, 4) for i in range(LAYERS)}
    weights = {f"{name}.weight": x for name, x in lora.items()}
    renamed = {name.replace("disha", "miss_block"): x for name, x in bone.items()}

    def scaled(scale: float) -> Any:
        return lambda w, p: with_lora(w, p, scale)

    with_a_lora = merged("7", lora, scaled(ALPHA / RANK))
    with_a_pissa = merged("7", pissa, with_pissa)
    with_a_bone, with_a_bat = merged("7", bone, with_bone), merged("7", bat, with_bat)
    rank_stabilized = merged("7", lora, scaled(ALPHA / RANK**0.5))
    foreign = {
        "peft-lora": Golden(
            {"peft-lora.pth": bfloat16(lora | norms)},
            merged("7", lora | norms, scaled(ALPHA / RANK)), alpha=ALPHA,
        ),
        "deepspeed-lora": Golden({"deepspeed-lora.pth": prefixed("_forward_module.model.", lora)}, with_a_lora, alpha=ALPHA),
        "peft-pissa": Golden(
            {"peft-pissa.pth": bfloat16(trained), "init_pissa.pth": prefixed("model.", init)},
            with_a_pissa, init="init_pissa.pth",
        ),
        "peft-pissa-2024": Golden(
            {"peft-pissa-2024.pth": bfloat16(trained), "init_pissa_2024.pth": init}, with_a_pissa, init="init_pissa_2024.pth"
        ),
        "peft-bone": Golden({"peft-bone.pth": bfloat16(bone | norms)}, merged("7", bone | norms, with_bone)),
        "peft-bat": Golden({"peft-bat.pth": bfloat16(bat)}, with_a_bat),
        "peft-bone-2024": Golden(
            {"peft-bone-2024.pth": {name.replace("disha", "bone"): x.bfloat16() for name, x in bone.items()}}, with_a_bone
        ),
        "peft-bat-2024": Golden(
            {"peft-bat-2024.pth": {name.replace("disha", "bone"): x.bfloat16() for name, x in bat.items()}}, with_a_bat
        ),
        "peft-bone-early-2025": Golden({"peft-bone-early-2025.pth": bfloat16(bone | states)}, with_a_bone),
        "peft-emb": Golden(
            {"peft-emb.pth": bfloat16(bone | replaced("7", "emb", "head"))},
            merged("7", bone | replaced("7", "emb", "head"), with_bone),
        ),
        "hf-lora": Golden(hugging_face({"peft_type": "LORA", "lora_alpha": ALPHA}, weights, "hf-lora"), with_a_lora),
        "hf-rslora": Golden(
            hugging_face({"peft_type": "LORA", "lora_alpha": ALPHA, "use_rslora": True}, weights, "hf-rslora"),
            rank_stabilized,
        ),
        "hf-miss": Golden(
            hugging_face({"peft_type": "MISS", "r": 3, "init_weights": True, "mini_r": 1}, renamed, "hf-miss"), with_a_bone
        ),
        "lm-lora-4": Golden(
            {"lm-lora-4.pth": bfloat16(lora_4)}, merged("4", lora_4, scaled(ALPHA / RANK)), "4", alpha=ALPHA
        ),
    }  # fmt: skip
    some: dict[str, Any] = {"targets": tuple(MATRICES_7), "layers": "all", "also": (), "state": "none", "load": None}
    plain = LoraConfig(kind="lora", rank=RANK, alpha=ALPHA, rank_stabilized=False, dropout=0.0, dora=False, **some)
    own = {
        "own-lora": ((lora, plain), with_a_lora),
        "own-rslora": ((lora, plain.model_copy(update={"rank_stabilized": True})), rank_stabilized),
        "own-pissa": (
            (pissa, PissaConfig(kind="pissa", rank=RANK, iterations=4, load_init=None, **some)),
            with_a_pissa,
        ),
        "own-bone": (
            (bone | norms, BoneConfig(kind="bone", rank=3, **(some | {"also": ("*ln*",)}))),
            merged("7", bone | norms, with_bone),
        ),
        "own-bat": ((bat, BatConfig(kind="bat", rank=RANK, **some)), with_a_bat),
        "own-peft": (
            (loha, PeftConfig(kind="peft", config={"peft_type": "LOHA", "r": 2, "alpha": 4}, **some)),
            merged("7", loha, with_loha),
        ),
        "own-full": (
            (norms, FullConfig(kind="full", layers="all", also=("*ln*",), state="none", load=None)),
            merged("7", norms, None),
        ),
    }
    return foreign | {name: Golden({f"{name}.pth": given}, want) for name, (given, want) in own.items()}


STATE = {f"blocks.{i}.att.time_state": values(f"state {i}", 2, 4, 4) for i in range(LAYERS)}
"""A file of RWKV-PEFT's state tuning: (head, value, key)."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and float32 values."""
    whole = hashlib.sha256()
    for name, x in tensors.items():
        whole.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode() + x.contiguous().numpy().tobytes())
    return whole.hexdigest()


def write(folder: Path) -> None:
    """All files, and the digests of what they merge to."""
    folder.mkdir(parents=True, exist_ok=True)
    for version in ("7", "4"):
        torch.save(base(version), folder / f"base-{version}.pth")
    torch.save({name: x.bfloat16() for name, x in STATE.items()}, folder / "peft-state.pth")
    for golden in every().values():
        for path, content in golden.files.items():
            target = folder / path
            target.parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                target.write_text(content)
            elif isinstance(content, tuple):
                file.write(target, content[0], record(folder, content[1]))
            elif target.suffix == ".safetensors":
                save_file(content, target)
            else:
                torch.save(content, target)
    digests = {name: digest(golden.merged) for name, golden in every().items()}
    (folder / DIGESTS.name).write_text(json.dumps(digests, indent=1) + "\n")


def record(folder: Path, config: Any) -> AdapterRecord:
    digest_of_base = sha256(folder / "base-7.pth")
    return AdapterRecord(
        format=1, adapter=config, base_sha256=digest_of_base, data_sha256="data", vocabulary_sha256="words", run="run"
    )


if __name__ == "__main__":
    write(FOLDER)
