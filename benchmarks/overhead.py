"""What the training engine adds to a step: RWKV-7 0.1B with a LoRA, by `fit` and by a bare loop of the same step, in turns.

python -m benchmarks.overhead [--threads N] [--rounds N] [--steps T] [--out FILE]

One process, one model. After each step of the engine (Lightning, the history, a log to a file) comes one of the loop: forward,
loss, backward, norm, AdamW. Checkpoints are timed by themselves, and shared out over 100 steps.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.machine import describe, parser, pin, tell
from benchmarks.settings import train_config
from benchmarks.train_step import CHANNELS, LAYERS, RANK, VOCABULARY, Step, make, seconds
from rwkv_core import memory
from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.rows import rows
from rwkv_core.training import checkpoints, fit
from rwkv_core.training.callbacks import StepCallback
from rwkv_core.training.module import Training
from rwkv_core.training.parallel import Ranks

EVERY = 100


class InTurns(StepCallback):
    """After each of the engine's steps one of the bare loop; comes last, so that all else of a step is the engine's."""

    def __init__(self, bare: Step) -> None:
        self.bare = bare
        self.engine: list[float] = []
        self.loop: list[float] = []
        self.save: list[float] = []
        self._since: float | None = None

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Take the other's turn."""
        if self._since is not None:
            self.engine.append(time.perf_counter() - self._since)
        self.loop.append(seconds(self.bare.both, time.perf_counter))
        if step % 4 == 0:
            folder = Path(trainer.default_root_dir)
            self.save.append(seconds(lambda: checkpoints.save(folder, trainer.save_checkpoint), time.perf_counter))
        self._since = time.perf_counter()


def config(steps: int, count: int) -> TrainConfig:
    rate = {"lr": 1e-5, "lr_final": 1e-5, "schedule": "constant", "warmup_steps": 0, "grad_clip": 0}
    never = {"validate_every": 10**6, "checkpoint_every": 10**6}
    return train_config(
        ctx_len=steps, micro_batch=1, epochs=None, steps=count, validate_rows=1, optimizer=rate, **never
    )


def measure(rounds: int, steps: int, folder: Path) -> str:
    model = make(torch.float32)
    turns = InTurns(Step(model, steps))
    for name, length in (("train", steps * (rounds + 4)), ("valid", 2 * steps)):
        writer = Writer(folder / name)
        writer.add(np.random.default_rng(0).integers(1, VOCABULARY, length).tolist())
        writer.close()
    settings = config(steps, rounds + 2)
    trainer = fit._trainer

    def with_turns(given: TrainConfig, callbacks: list[pl.Callback], here: Ranks) -> pl.Trainer:
        made = trainer(given, [*callbacks, turns], here)
        made._default_root_dir = str(folder)
        return made

    fit._trainer = with_turns
    with (folder / "log.jsonl").open("w") as log:
        fit.fit(
            model,
            model.parameter_groups(settings.optimizer.lr, 0.0),
            rows(Documents(folder / "train"), settings, 1),
            rows(Documents(folder / "valid"), settings, None),
            settings,
            seed=1,
            folder=folder,
            log=lambda step, metrics: print(json.dumps([step, metrics]), file=log, flush=True),
        )
    # the first maps memory; the last has the run's last measurement and checkpoint in it
    engine, loop, save = median(turns.engine[1:-1]), median(turns.loop[1:-1]), median(turns.save)
    size = (folder / checkpoints.LAST).stat().st_size / 1e6
    whole = engine + save / EVERY
    return "\n".join(
        [
            f"B1 T{steps} L{LAYERS} C{CHANNELS} V{VOCABULARY}, LoRA of rank {RANK}; float32.",
            "",
            "| | milliseconds | beside the loop |",
            "| --- | ---: | ---: |",
            f"| bare loop | {loop * 1e3:.1f} | |",
            f"| engine | {engine * 1e3:.1f} | {100 * (engine / loop - 1):+.2f} % |",
            f"| a checkpoint of {size:.0f} MB, written and synced | {save * 1e3:.1f} | |",
            f"| engine with one every {EVERY} steps | {whole * 1e3:.1f} | {100 * (whole / loop - 1):+.2f} % |",
        ]
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=512, help="tokens of the row")
    given = options.parse_args()
    pin(given.threads)
    with tempfile.TemporaryDirectory() as folder, memory.reused():
        table = measure(given.rounds, given.steps, Path(folder))
    tell(f"{describe()}; wall time, medians of {given.rounds}\n\n{table}\n", given.out)


if __name__ == "__main__":
    main()
