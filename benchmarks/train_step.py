"""A LoRA training step of RWKV-7 0.1B against its floor: the matrix products that no way of computing it can leave out.

python -m benchmarks.train_step [--threads N] [--rounds N] [--steps T] [--out FILE]

All take turns, so that other load on the machine meets all alike. Beside the ratio: where the time goes, and what the forward
keeps for the backward.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import describe, parser, pin, tell
from kernels import head_loss as head
from kernels.products import product, put
from rwkv_core import memory
from rwkv_core.adapters import attach
from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import RWKV

LAYERS, CHANNELS, HEAD_SIZE, VOCABULARY = 12, 768, 64, 65536
PAIRS = ("w", "a", "g", "v")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "mkldnn::_linear_pointwise")
TARGETS = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]


def lora(rank: int, targets: Sequence[str] = TARGETS, *, alpha: float | None = None, dora: bool = False) -> Any:
    """As a LoraConfig, without pydantic."""
    return SimpleNamespace(
        kind="lora", rank=rank, alpha=alpha or rank, rank_stabilized=False, dropout=0.0, dora=dora,
        targets=targets, layers="all", also=(), state="none",
    )  # fmt: skip


RANK = 64


def make(dtype: torch.dtype) -> RWKV:
    """A model of initial values, and adapters that have been trained a little: none of their gradients is zero."""
    model = RWKV7(RWKV7.new_shape(LAYERS, CHANNELS, HEAD_SIZE, VOCABULARY))
    generator = torch.Generator().manual_seed(0)
    model.initialize(generator)
    model.to(dtype)
    attach(model, lora(RANK), seed=1)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_B, std=1e-2, generator=generator)
    return model


_LARGE = 1 << 25
"""Bytes from which on new memory costs more than to copy what was made elsewhere."""


class Floor:
    """The products of a step; large ones into memory that is already there."""

    def __init__(self, model: RWKV, rows: int) -> None:
        self.rows = rows
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        self._buffers: dict[tuple[str, int, int], Tensor] = {}
        with torch.no_grad():
            for layer, block in enumerate(model.blocks):
                for name, module in block.named_modules():
                    if isinstance(module, LoraLinear):
                        self._adapted(module, not layer and name in ("att.receptance", "att.key", "att.value"))
                for pair in PAIRS:
                    if hasattr(block.att, f"{pair}1"):
                        self._low_rank(getattr(block.att, f"{pair}1"), getattr(block.att, f"{pair}2"), not layer)
            self._head(model.head.weight.detach())

    def __call__(self) -> None:
        """Do them all."""
        with torch.no_grad():
            for x, y, out in self.products:
                put(out, x, y) if out.nbytes > _LARGE else product(x, y)

    def flops(self) -> int:
        """Floating-point operations of them all."""
        return sum(2 * out.numel() * x.shape[1] for x, _, out in self.products)

    def _buffer(self, kind: str, rows: int, columns: int) -> Tensor:
        made = self._buffers.get((kind, rows, columns))
        if made is None:
            made = self._buffers[kind, rows, columns] = torch.randn(rows, columns)
        return made

    def _rows(self, columns: int, rows: int | None = None) -> Tensor:
        return self._buffer("in", rows or self.rows, columns)

    def _add(self, x: Tensor, y: Tensor) -> None:
        self.products.append((x, y, self._buffer("out", x.shape[0], y.shape[1])))

    def _adapted(self, m: LoraLinear, first: bool) -> None:
        """A frozen matrix and its LoRA, forward and backward; the `first` of a model need no gradient of their input."""
        x, dy, low = self._rows(m.in_features), self._rows(m.out_features), self._rows(len(m.lora_A))
        self._add(x, m.weight.mT)
        self._add(x, m.lora_A.mT)
        self._add(low, m.lora_B.mT)
        self._add(dy, m.lora_B)
        self._add(dy.mT, low)
        self._add(low.mT, x)
        if not first:
            self._add(dy, m.weight)
            self._add(low, m.lora_A)

    def _low_rank(self, down: Tensor, up: Tensor, first: bool) -> None:
        """A frozen low-rank pair; in the first layer nothing before it is trained, so it has no backward."""
        x, low = self._rows(len(down)), self._rows(len(up))
        self._add(x, down)
        self._add(low, up)
        if not first:
            self._add(x, up.mT)
            self._add(low, down.mT)

    def _head(self, weight: Tensor) -> None:
        """A frozen head: the logits, in blocks as `kernels.head_loss` does them, and the gradient of its input."""
        rows = head._rows(self.rows, len(weight) * weight.itemsize)
        for start in range(0, self.rows, rows):
            count = min(rows, self.rows - start)
            self._add(self._rows(CHANNELS, count), weight.mT)
            self._add(self._rows(len(weight), count), weight)


class Step:
    """What training does for each micro-batch of one row, and for each step."""

    def __init__(self, model: RWKV, steps: int) -> None:
        self.model = model
        tokens = torch.randint(1, VOCABULARY, (1, steps + 1), generator=torch.Generator().manual_seed(1))
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def gradients(self) -> None:
        """Forward, loss and backward."""
        self.optimizer.zero_grad()
        features, _ = self.model.features(self.inputs)
        loss = head.head_loss(features.flatten(0, 1), self.model.head.weight, self.targets) / len(self.targets)
        loss.backward()

    def update(self) -> None:
        """The gradient's norm and the optimizer."""
        torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.step()

    def both(self) -> None:
        """A whole step of one micro-batch."""
        self.gradients()
        self.update()

    def kept(self) -> dict[str, int]:
        """Bytes of what the blocks' forward leaves alive for the backward, by shape and dtype."""
        with _New() as new:
            result = self.model.features(self.inputs)
        alive = {key: found for key, found in new.found.items() if not found[0].expired()}
        others = [result[0], *(x for block in result[1] for x in block), *self.model.parameters()]
        for x in others:
            alive.pop(x.untyped_storage()._cdata, None)
        kept: dict[str, int] = {}
        for _, name, size in alive.values():
            kept[name] = kept.get(name, 0) + size
        return kept


class _New(TorchDispatchMode):
    """Notes the memory of everything that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                name = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                known = self.found.get(storage._cdata)
                if known is None or known[0].expired():
                    self.found[storage._cdata] = StorageWeakRef(storage), name, storage.nbytes()
        return result


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def breakdown(step: Step) -> dict[str, float]:
    """Seconds of a step, by what was computed."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step.gradients()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        product = event.key in PRODUCTS
        name = "matrix products" if product else event.key
        spent[name] = spent.get(name, 0.0) + event.self_cpu_time_total / 1e6
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def units(step: Step, itemsize: int) -> float:
    """What is kept, in values of C for each token and layer."""
    size = sum(step.kept().values())
    return size / (len(step.targets) * LAYERS * CHANNELS * itemsize)


def measure(rounds: int, steps: int, clock: Callable[[], float]) -> str:
    model = make(torch.float32)
    floor, step = Floor(model, steps), Step(model, steps)
    calls = {"floor": floor, "gradients": step.gradients, "both": step.both}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            took[name].append(seconds(call, clock))
    t = {name: median(times[1:]) for name, times in took.items()}  # the first maps memory and starts threads
    lines = [
        f"B1 T{steps} L{LAYERS} C{CHANNELS} V{VOCABULARY}, LoRA of rank {RANK} on {', '.join(TARGETS)}; float32.",
        "",
        "| | milliseconds | tokens/s | / floor |",
        "| --- | ---: | ---: | ---: |",
    ]
    for title, name in (
        (f"matrix products alone, {floor.flops() / 1e9:.0f} GFLOP", "floor"),
        ("forward, loss and backward", "gradients"), ("with norm and optimizer", "both"),
    ):  # fmt: skip
        lines.append(f"| {title} | {t[name] * 1e3:.0f} | {steps / t[name]:.0f} | {t[name] / t['floor']:.2f} |")
    found = [breakdown(step) for _ in range(3)]
    spent = {name: median([f.get(name, 0.0) for f in found]) for name in found[0]}
    whole = sum(spent.values())
    lines += ["", "| of forward, loss and backward | milliseconds | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {s * 1e3:.1f} | {s / whole:.3f} |" for name, s in spent.items() if s > 0.004 * whole]
    small = sum(s for s in spent.values() if s <= 0.004 * whole)
    lines.append(f"| all smaller | {small * 1e3:.1f} | {small / whole:.3f} |")
    narrow = Step(make(torch.bfloat16), steps)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = units(narrow, 2)
    lines += [
        "",
        "Kept for the backward of the blocks, in values of C for each token and layer, the frozen parameters left out: "
        f"{units(step, 4):.2f} in float32, {mixed:.2f} in bfloat16.",
    ]
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=512, help="tokens of the row")
    options.add_argument(
        "--processor-time", action="store_true", help="for one thread on a machine that has other work"
    )
    given = options.parse_args()
    pin(given.threads)
    clock = time.process_time if given.processor_time else time.perf_counter
    kind = "processor time" if given.processor_time else "wall time"
    with memory.reused():  # as in training
        tables = measure(given.rounds, given.steps, clock)
    text = f"{describe()}; {kind}, medians of {given.rounds}\n\n{tables}\n"
    tell(text, given.out)


if __name__ == "__main__":
    main()
