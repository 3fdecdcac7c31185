"""A training step of RWKV-7 0.1B by every method, against a step through the frozen model that trains one layer norm alone.

python -m benchmarks.adapters [--rank N] [--quantize FORM] [--threads N] [--rounds N] [--steps T] [--out FILE]

Each takes turns with the frozen model alone: a program trains by one method, and what others leave in caches and in the heap
is not its own. The frozen model by itself says how far turns differ. Beside the time: what is trained, and what the forward
keeps for the backward.
"""

import time
from statistics import median
from types import SimpleNamespace
from typing import Any, get_args

import torch

from benchmarks.machine import describe, parser, pin, tell
from benchmarks.train_step import CHANNELS, HEAD_SIZE, LAYERS, TARGETS, VOCABULARY, Step, lora, seconds, units
from rwkv_core import memory
from rwkv_core.adapters import METHODS, attach
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import Linear
from rwkv_core.quantize import Form, Packed, QuantizedLinear

FROZEN = SimpleNamespace(kind="full", layers="0", also=("ln0.*",), state="none")
"""All of the model's own backward runs, and next to nothing is trained."""


def methods(rank: int) -> dict[str, Any]:
    """The configs, by kind, without pydantic."""
    beside = {"rank": rank, "targets": TARGETS, "layers": "all", "also": (), "state": "none"}
    more: dict[str, dict[str, Any]] = {
        "pissa": {"iterations": 4},
        "peft": {"config": {"peft_type": "LORA", "r": rank, "lora_alpha": rank}},
    }
    found = {kind: SimpleNamespace(kind=kind, **beside, **more.get(kind, {})) for kind in METHODS}
    return {
        **found,
        "lora": lora(rank),
        "lora, dora": lora(rank, dora=True),
        "full": SimpleNamespace(kind="full", layers="all", also=("*",), state="none"),
        "state": SimpleNamespace(kind="state", layers="all", also=(), state="wkv"),
    }


def make(config: Any, steps: int, form: Form = "none") -> Step:
    """A model of initial values, its matrices packed, and what the method puts beside it."""
    model = RWKV7(RWKV7.new_shape(LAYERS, CHANNELS, HEAD_SIZE, VOCABULARY))
    model.initialize(torch.Generator().manual_seed(0))
    if form != "none":
        for name, matrix in [(name, m) for name, m in model.blocks.named_modules() if isinstance(m, Linear)]:
            model.blocks.set_submodule(name, QuantizedLinear(Packed(matrix.weight, form)))
    attach(model, config, seed=1)
    return Step(model, steps)


def measure(rank: int, rounds: int, steps: int, form: Form) -> str:
    """The table; the frozen model that all are compared with is never packed."""
    chosen: dict[str, tuple[Any, Form]] = {kind: (config, "none") for kind, config in methods(rank).items()}
    if form != "none":
        chosen = {f"{kind}, {form}": (config, form) for kind, (config, _) in chosen.items() if kind != "full"}
    frozen = make(FROZEN, steps)
    lines = [
        f"B1 T{steps} L{LAYERS} C{CHANNELS} V{VOCABULARY}, rank {rank} beside {', '.join(TARGETS)}; float32.",
        "",
        "| | trained | forward, loss and backward, ms | frozen, ms | ratio | kept for the backward, values of C |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, (config, packed) in {"frozen": (FROZEN, "none"), **chosen}.items():
        step = make(config, steps, packed)
        took: list[tuple[float, float]] = []
        for _ in range(rounds + 2):
            took.append((seconds(frozen.gradients, time.perf_counter), seconds(step.gradients, time.perf_counter)))
        base, own = (median(times) for times in zip(*took[2:], strict=True))
        count = sum(p.numel() for p in step.trained)
        lines.append(
            f"| {kind} | {count} | {own * 1e3:.0f} | {base * 1e3:.0f} | {own / base:.2f} | {units(step, 4):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--steps", type=int, default=512, help="tokens of the row")
    options.add_argument("--quantize", choices=get_args(Form), default="none", help="how the matrices are kept")
    given = options.parse_args()
    pin(given.threads)
    with memory.reused():  # as in training
        table = measure(given.rank, given.rounds, given.steps, given.quantize)
    text = f"{describe()}; medians of {given.rounds}\n\n{table}\n"
    tell(text, given.out)


if __name__ == "__main__":
    main()
