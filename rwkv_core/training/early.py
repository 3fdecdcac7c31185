"""A run ends when the held-out loss falls no more, or halts, to go on another time."""

import math
from collections.abc import Mapping

import pytorch_lightning as pl

from rwkv_core.config import StopEarlyConfig
from rwkv_core.training.callbacks import StepCallback
from rwkv_core.training.module import History, Training


def has_settled(valid: History, config: StopEarlyConfig | None) -> bool:
    """Whether the last `patience` measurements were no gain. A function of the history: a continued run ends where it would."""
    if config is None:
        return False
    best, without = math.inf, 0
    for _, row in sorted(valid.items()):
        if row["loss"] < best - config.min_gain:
            best, without = row["loss"], 0
        else:
            without += 1
    return without >= config.patience


def is_over(history: Mapping[str, History], done: int, steps: int, config: StopEarlyConfig | None) -> bool:
    """Whether a run has nothing left to do after `done` of `steps` steps."""
    return done == steps or (done in history["valid"] and has_settled(history["valid"], config))


class StopEarly(StepCallback):
    """Asks Lightning to end after the step, once it is measured and before it is saved.

    Args:
        config: when the run is over.
        halt: steps after which it ends for now.
    """

    def __init__(self, config: StopEarlyConfig | None, halt: int | None) -> None:
        self._config, self._halt = config, halt

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Look at what was measured, if this step was."""
        valid = training.history["valid"]
        if step in valid and has_settled(valid, self._config):
            print(f"the held-out loss falls no more: the run ends after step {step}", flush=True)
            trainer.should_stop = training.ended = True
        elif step == self._halt:
            print(f"the run halts after step {step}", flush=True)
            trainer.should_stop = True
