"""What `rwkvflow plan` predicts against what training takes, each run in a process of its own.

python -m benchmarks.plan [--out FILE] [--only N[,N]]

CPU: the peak of resident memory, from `import torch` to the end of `fit`: loading, steps, validation, checkpoints. The
prediction is made in that process before the model is loaded, as in tasks/train.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.settings import train_settings

LAYERS, CHANNELS, VOCABULARY = 6, 512, 8192

TRAIN: dict[str, Any] = {
    "ctx_len": 512, "rows": "stream", "micro_batch": 4, "epochs": None, "steps": 2, "validate_every": 2, "validate_rows": 2,
    "checkpoint_every": 2, "memory": "warn", "optimizer": {"lr_final": 0.002, "schedule": "constant", "warmup_steps": 0},
}  # fmt: skip
"""Short: two steps."""

MATRICES: dict[str, Any] = {
    "targets": ["att.*", "ffn.*"], "layers": "all", "also": [], "state": "none", "load": None,
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 32, "alpha": 32.0, "rank_stabilized": False, "dropout": 0.0, "dora": False, **MATRICES},
    "dora": {"kind": "lora", "rank": 32, "alpha": 32.0, "rank_stabilized": False, "dropout": 0.1, "dora": True, **MATRICES},
    "pissa": {"kind": "pissa", "rank": 32, "iterations": 4, "load_init": None, **MATRICES},
    "bone": {"kind": "bone", "rank": 64, **MATRICES},
    "bat": {"kind": "bat", "rank": 64, **MATRICES},
    "state": {"kind": "state", "state": "wkv", "layers": "all", "also": [], "load": None},
    "full": {"kind": "full", "layers": "all", "also": ["*"], "state": "none", "load": None},
    **{
        f"peft {config['peft_type']}": {"kind": "peft", "config": config, **MATRICES}
        for config in (
            {"peft_type": "LORA", "r": 32, "lora_alpha": 32}, {"peft_type": "LOHA", "r": 16}, {"peft_type": "IA3"},
            {"peft_type": "OFT", "oft_block_size": 32}, {"peft_type": "FOURIERFT", "n_frequency": 1000},
        )
    },
}  # fmt: skip


def case(version: str, adapter: str, *, quantize: str = "none", shape: str = "", **train: Any) -> dict[str, Any]:
    """One run."""
    sizes = shape or f"{LAYERS}x{CHANNELS}x{VOCABULARY}"
    return {"shape": f"{version}:{sizes}", "adapter": adapter, "quantize": quantize, "train": train}


CASES = [
    *(case(version, adapter) for version in "4567" for adapter in ("lora", "full")),
    *(case(version, "bone") for version in "57"),
    *(case(version, "state", rows="pad") for version in "567"),
    case("7", "dora"),
    case("7", "pissa", micro_batch=2),
    *(case("7", name) for name in ADAPTERS if name.startswith("peft ")),
    case("7", "peft LORA", precision="bf16"),
    case("6", "peft LORA", quantize="nf4", micro_batch=2),
    case("6", "bat", micro_batch=2),
    case("7", "lora", micro_batch=1),
    case("7", "lora", micro_batch=2, accumulate=2),
    case("4", "lora", micro_batch=8, ctx_len=256),
    case("7", "lora", micro_batch=1, ctx_len=1536),
    case("7", "lora", shape="12x768x8192", micro_batch=1),
    case("6", "lora", shape="4x1024x32768", micro_batch=1),
    case("4", "lora", quantize="int8"),
    case("7", "lora", quantize="nf4-double"),
    case("6", "bone", quantize="fp8", micro_batch=2),
    *(case(version, "lora", precision="bf16") for version in "67"),
    case("5", "full", precision="bf16", micro_batch=2),
    case("7", "full", shape="4x512x32768", micro_batch=2),
    case("7", "lora", rows="pack", carry_state=True, micro_batch=2),
]  # fmt: skip
"""The grid."""


def run(folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """Make the base and the data, then train in another process."""
    import numpy as np
    import torch

    from rwkv_core import checkpoint
    from rwkv_core.data.binidx import Writer
    from rwkv_core.plan import base_named

    base = base_named(chosen["shape"])
    model = base.version(base.shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.01, 0.01, generator=generator)
    checkpoint.write(folder / "base.pth", model.state_dict(), "bf16")
    del model
    train = train_settings(**TRAIN | chosen["train"])
    drawn = np.random.default_rng(0)
    for side, count in (("train", 64), ("valid", 8)):
        writer, size = Writer(folder / side), train["ctx_len"] // (2 if train["carry_state"] else 1)
        for _ in range(count):
            writer.add(drawn.integers(1, base.shape.vocab_size, size).tolist())
        writer.close()
    settings = {
        "model": {
            "base": str(folder / "base.pth"), "head_size_divisor": None, "op": "auto", "quantize": chosen["quantize"],
        },
        "adapter": ADAPTERS[chosen["adapter"]], "train": train,
    }  # fmt: skip
    words = [sys.executable, "-m", "benchmarks.plan", "--child", str(folder), json.dumps(settings)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def child(folder: Path, text: str) -> None:
    """Plan, load, train; print both figures."""
    import torch

    import tasks.train  # noqa: F401 (all that the stage imports)
    from rwkv_core import models, plan
    from rwkv_core.adapters import attach
    from rwkv_core.config import ModelConfig, TrainConfig
    from rwkv_core.data.binidx import Documents
    from rwkv_core.data.rows import rows
    from rwkv_core.training.callbacks import peak_memory_mb
    from rwkv_core.training.fit import fit
    from tasks.params import AdapterConfig

    given = json.loads(text)
    model_config, train = ModelConfig(**given["model"]), TrainConfig(**given["train"])
    from pydantic import TypeAdapter

    adapter: Any = TypeAdapter(AdapterConfig).validate_python(given["adapter"])
    documents, held_out = Documents(folder / "train"), Documents(folder / "valid")
    began = time.perf_counter()
    settings = plan.Settings(model_config, adapter, train, row=plan.longest(documents, train))
    found = plan.predict(plan.base_in(model_config.base), settings, plan.here(adapter))
    took = time.perf_counter() - began
    model = models.load(
        model_config.base, dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32, **model_config.how()
    )
    attach(model, adapter, 0)
    loaded = peak_memory_mb()
    after_state = adapter.state != "none"
    result = fit(
        model,
        model.parameter_groups(train.optimizer.lr, 0.0),
        rows(documents, train, 0, after_state=after_state),
        rows(held_out, train, None, after_state=after_state),
        train,
        seed=0,
        folder=folder,
        log=lambda step, metrics: None,
    )
    terms = {name: size / 1e6 for name, size in found.terms.items()}
    print(json.dumps({
        "predicted": found.allocated / 1e6, "measured": result.peak_memory_mb, "loaded": loaded, "took": took, "terms": terms,
    }))  # fmt: skip


def main() -> None:
    """Run the grid, print a table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path)
    words.add_argument("--only", default="")
    words.add_argument("--child", nargs=2)
    words.add_argument("--json", type=Path)
    words.add_argument("--terms", action="store_true")
    given = words.parse_args()
    if given.child:
        child(Path(given.child[0]), given.child[1])
        return
    chosen = [CASES[int(i)] for i in given.only.split(",")] if given.only else CASES
    lines, errors = [], []
    for one in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = run(Path(folder), one)
        error = found["predicted"] / found["measured"] - 1
        errors.append(abs(error))
        other = ", ".join(f"{name} {value}" for name, value in one["train"].items())
        lines.append(
            f"| {one['shape']} | {one['adapter']} | {one['quantize']} | {other} | {found['predicted']:.0f} | "
            f"{found['measured']:.0f} | {100 * error:+.1f} | {found['took']:.1f} |"
        )
        print(lines[-1], f"loaded {found['loaded']:.0f}", flush=True)
        if given.json:
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one | found) + "\n")
        if given.terms:
            print({name: round(size) for name, size in found["terms"].items()})
    summary = f"{len(errors)} runs: worst {100 * max(errors):.1f} %, median {100 * median(errors):.1f} %."
    print(summary)
    if given.out:
        head = (
            "| model | method | packed | other settings | predicted, MB | measured, MB | error, % | planned in, s |\n"
            "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |"
        )
        given.out.write_text("\n".join([head, *lines, "", summary, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
