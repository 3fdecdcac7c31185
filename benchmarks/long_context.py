"""Rows longer than memory: peak memory and speed of LoRA training by how a row is read.

python -m benchmarks.long_context [--threads N] [--rounds N] [--channels C] [--layers L] [--tokens T ...] [--segment S]
                                  [--processor-time] [--out FILE]

The model has the demo's shape unless told otherwise. Each peak is that of a process of its own: forward, loss and backward of
one row. Speeds are compared within one process, in turns: the row in segments against the longest row in one graph.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe, parser, pin, tell
from benchmarks.settings import train_config
from benchmarks.train_step import lora
from rwkv_core import memory
from rwkv_core.adapters import attach
from rwkv_core.data.sampling import Batch, Group
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.training.callbacks import peak_memory_mb
from rwkv_core.training.module import Training

HEAD_SIZE, VOCABULARY, RANK = 64, 65536, 16


class Row:
    """Forward, loss and backward of one row."""

    def __init__(self, model: RWKV7, tokens: int, **context: Any) -> None:
        self.tokens, self._model, self._context = tokens, model, context
        drawn = torch.randint(1, VOCABULARY, (1, tokens + 1), generator=torch.Generator().manual_seed(1))
        self._batch = Batch((Group(drawn[:, :-1], drawn[:, 1:], None, None, None),), tokens, tokens, tokens)

    def __call__(self) -> None:
        """Do it."""
        settings = train_config(ctx_len=self.tokens, context=self._context)
        self._model.zero_grad()
        loss = Training(self._model, [], settings, 1, 0).training_step(self._batch, 0)
        loss.backward()  # type: ignore[no-untyped-call]

    def seconds(self, clock: Callable[[], float]) -> float:
        """Do it, and say how long that took."""
        began = clock()
        self()
        return clock() - began


def make(layers: int, channels: int) -> RWKV7:
    model = RWKV7(RWKV7.new_shape(layers, channels, HEAD_SIZE, VOCABULARY))
    model.initialize(torch.Generator().manual_seed(0))
    attach(model, lora(RANK, ["att.*", "ffn.*"]), seed=1)
    return model.train()


def peak(given: argparse.Namespace, tokens: int, **context: Any) -> tuple[float, float]:
    """MB, and seconds, of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_context", "--one", json.dumps({"tokens": tokens} | context)]
    for name in ("threads", "layers", "channels"):
        command += [f"--{name}", str(getattr(given, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{tokens} {context}: {found}", file=sys.stderr, flush=True)
    return found["megabytes"], found["seconds"]


def ways(tokens: list[int], segment: int) -> list[tuple[str, int, dict[str, Any]]]:
    """What is measured: what it is called, tokens, and settings of train.context."""
    longest = max(tokens)
    return [
        *(("one graph", t, {}) for t in tokens),
        ("one graph, grad_cp", longest, {"grad_cp": True}),
        *((f"segments of {segment}", n * segment, {"segment": segment}) for n in (8, 64)),
        (f"segments of {segment}, grad_cp", 8 * segment, {"segment": segment, "grad_cp": True}),
        (f"segments of {segment}, bptt 1", 8 * segment, {"segment": segment, "bptt": 1}),
    ]


def measure(given: argparse.Namespace, clock: Callable[[], float]) -> str:
    lines = [
        f"RWKV-7, {given.layers} layers of {given.channels}, a vocabulary of {VOCABULARY}, LoRA of rank {RANK}, float32.",
        "",
        "| the row is read in | tokens | peak memory, MB |",
        "| --- | ---: | ---: |",
    ]
    for name, tokens, context in ways(given.tokens, given.segment):
        lines.append(f"| {name} | {tokens} | {peak(given, tokens, **context)[0]:.0f} |")
    model, longest = make(given.layers, given.channels), max(given.tokens)
    rows = {
        "one graph": Row(model, longest),
        "one graph, grad_cp": Row(model, longest, grad_cp=True),
        f"segments of {given.segment}": Row(model, longest, segment=given.segment),
        f"segments of {given.segment}, bptt 1": Row(model, longest, segment=given.segment, bptt=1),
    }
    took: dict[str, list[float]] = {name: [] for name in rows}
    for row in rows.values():
        row()
    for _ in range(given.rounds):
        for name, row in rows.items():
            took[name].append(row.seconds(clock))
    floor = median(took["one graph"])
    lines += ["", f"| {longest} tokens in | tokens/s | / one graph |", "| --- | ---: | ---: |"]
    for name, times in took.items():
        lines.append(f"| {name} | {longest / median(times):.0f} | {floor / median(times):.2f} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--channels", type=int, default=128)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="of rows in one graph")
    options.add_argument("--segment", type=int, default=1024)
    options.add_argument(
        "--processor-time", action="store_true", help="for one thread on a machine that has other work"
    )
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    clock = time.process_time if given.processor_time else time.perf_counter
    kind = "processor time" if given.processor_time else "wall time"
    pin(given.threads)
    with memory.reused():  # as in training
        if given.one:
            settings = json.loads(given.one)
            seconds = Row(make(given.layers, given.channels), settings.pop("tokens"), **settings).seconds(clock)
            print(json.dumps({"megabytes": peak_memory_mb(), "seconds": seconds}))
            return
        tables = measure(given, clock)
    tell(f"{describe()}; {kind}, medians of {given.rounds}\n\n{tables}\n", given.out)


if __name__ == "__main__":
    main()
