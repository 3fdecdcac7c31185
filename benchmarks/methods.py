"""Every method on the demo, at equal steps: what it learns, and what that takes.

python -m benchmarks.methods [--steps N] [--threads N] [--only NAME ...] [--lr RATE] [--out FILE] [--readme]

It reads what `make demo` made: base and prepared data. Each run is a process of its own, with the demo's settings but for the
method and its learning rate. All are scored on the same tokens: every held-out document, without its first token, which nothing
predicts after a tuned state. --readme puts the table into README.md, in place of the one there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from benchmarks.machine import describe, parser, pin, tell
from rwkv_core import checkpoint, evaluate, models
from rwkv_core.adapters import attach, trained_state
from rwkv_core.adapters.file import AdapterRecord, write
from rwkv_core.config import AdapterConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.rows import rows
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge
from rwkv_core.tokenizer import named
from rwkv_core.training.fit import fit
from rwkv_core.training.optimizers import groups
from tasks import stage
from tasks.params import load

README = Path("README.md")
BEGIN, END = "<!-- methods: made by python -m benchmarks.methods --readme -->\n", "<!-- /methods -->\n"


class Run(NamedTuple):
    """A method as it is measured."""

    adapter: dict[str, Any]
    lr: float
    """Not searched for: any of them may do better at another."""
    quantize: str = "none"


BESIDE: dict[str, Any] = {"layers": "all", "state": "none", "load": None, "also": []}
TARGETS: dict[str, Any] = BESIDE | {"targets": ["att.*", "ffn.*"]}
LORA = TARGETS | {"kind": "lora", "rank": 16, "alpha": 32, "rank_stabilized": False, "dropout": 0.0, "dora": False}
STATE = BESIDE | {"kind": "state", "state": "wkv"}
RUNS = {
    "full": Run(BESIDE | {"kind": "full", "also": ["*"]}, 0.001),
    "lora, rank 16": Run(LORA, 0.002),
    "lora, DoRA": Run(LORA | {"dora": True}, 0.002),
    "pissa, rank 16": Run(TARGETS | {"kind": "pissa", "rank": 16, "iterations": 4, "load_init": None}, 0.002),
    "bone, rank 32": Run(TARGETS | {"kind": "bone", "rank": 32}, 0.002),
    "bat, rank 32": Run(TARGETS | {"kind": "bat", "rank": 32}, 0.002),
    "peft, LoHa of rank 8": Run(
        TARGETS | {"kind": "peft", "config": {"peft_type": "LOHA", "r": 8, "alpha": 16}}, 0.004
    ),
    "state": Run(STATE, 0.3),
    "lora and state": Run(LORA | {"state": "wkv"}, 0.004),
    "lora beside int8": Run(LORA, 0.002, "int8"),
    "lora beside nf4": Run(LORA, 0.002, "nf4"),
    "pissa beside nf4": Run(
        TARGETS | {"kind": "pissa", "rank": 16, "iterations": 4, "load_init": None}, 0.002, "nf4"
    ),
}  # fmt: skip
"""LoRA of rank 16, Bone and Bat of rank 32 train equally many parameters of a square matrix."""


def train(name: str, steps: int, lr: float | None) -> dict[str, float]:
    """One of them, in this process."""
    run, params = RUNS[name], load()
    adapter: AdapterConfig = TypeAdapter(AdapterConfig).validate_python(run.adapter)
    after_state = adapter.state != "none"
    optimizer = params.train.optimizer.model_copy(update={"lr": lr or run.lr, "lr_final": (lr or run.lr) / 10})
    config = params.train.model_copy(
        update={
            "rows": "pad" if after_state else "stream",
            "optimizer": optimizer,
            "validate_every": steps,
            "epochs": None,
            "steps": steps,
            "tokens": None,
        }
    )
    lessons, test = (
        rows(Documents(stage.DATA / side), config, seed, after_state=after_state)
        for side, seed in (("train", params.seed), ("valid", None))
    )
    how = params.model.how() | {"quantize": run.quantize}
    model = models.load(params.model.base, dtype=torch.float32, **how)
    attach(model, adapter, params.seed, originals=checkpoint.read(params.model.base))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        learned = groups(model, config.optimizer)
        result = fit(model, learned, lessons, test, config, seed=params.seed, folder=path, log=lambda *_: None)
        record = AdapterRecord(
            format=1, adapter=adapter, quantize=how["quantize"], base_sha256=sha256(params.model.base), data_sha256=None,
            vocabulary_sha256=None, run=None,
        )  # fmt: skip
        write(path / "adapter.pth", trained_state(model), record)
        merge(params.model.base, [Part(path / "adapter.pth")], path / "merged.pth")
        return {
            "loss": held_out(path / "merged.pth", path / "merged.state.pth"),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "bytes": (path / "adapter.pth").stat().st_size,
            "seconds": result.seconds / result.steps,
            "tokens": result.tokens,
            "memory": result.peak_memory_mb,
        }


def held_out(path: Path, state: Path) -> float:
    """Mean loss of a merged model after its state, if there is one."""
    params = load()
    model = models.load(path, dtype=torch.float32, op=params.model.op).eval()
    tokenizer = named(params.data.tokenizer, params.data.special_tokens)
    scores = evaluate.score(
        model, Documents(stage.DATA / "valid"), tokenizer, ctx_len=params.evaluate.ctx_len,
        batch=params.evaluate.batch, state=checkpoint.read(state) if state.exists() else None, skip_first=True,
    )  # fmt: skip
    return scores.loss()


def measure(names: list[str], steps: int, threads: int, lr: float | None) -> str:
    """The table."""
    base = held_out(load().model.base, Path("none"))
    lines = [
        f"{steps} steps of the demo; the base's held-out loss is {base:.4f} nats a token.",
        "",
        "| method | learning rate | held-out loss | trained | adapter, kB | tokens | seconds a step | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        command = [sys.executable, "-m", "benchmarks.methods", "--one", name, "--steps", str(steps)]
        command += ["--threads", str(threads), *(["--lr", str(lr)] if lr else [])]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        r = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {r['loss']:.4f} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
        lines.append(
            f"| {name} | {lr or RUNS[name].lr:g} | {r['loss']:.4f} | {r['trained']} | {r['bytes'] / 1000:.0f} | "
            f"{r['tokens']} | {r['seconds']:.3f} | {r['memory']:.0f} |"
        )
    return "\n".join(lines)


def into_readme(text: str) -> None:
    """In place of the table that is there."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} has no place for the table: put back {BEGIN.strip()} and {END.strip()}")
    README.write_text(f"{before}{BEGIN}{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=160, help="optimizer steps of each run")
    options.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="methods to run")
    options.add_argument("--lr", type=float, help="learning rate, in place of each method's own")
    options.add_argument("--readme", action="store_true", help=f"also put the table into {README}")
    options.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    given = options.parse_args()
    pin(given.threads)
    if given.one:
        print(json.dumps(train(given.one, given.steps, given.lr)))
        return
    table = measure(given.only, given.steps, given.threads, given.lr)
    tell(f"{describe()}\n\n{table}\n", given.out)
    if given.readme:
        into_readme(table)


if __name__ == "__main__":
    main()
