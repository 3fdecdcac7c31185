"""The adapters that are kept of a run: every so many steps or epochs, the last ones, the best by held-out loss.

Which they are at a step is a function of the settings and of the losses measured until then, so that a run that was killed and
continued keeps the same ones. A file goes when neither this step nor a checkpoint that the run may have to go back to wants it.
"""

import bisect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkv_core.config import SavesConfig
from rwkv_core.errors import InputError
from rwkv_core.training.callbacks import StepCallback
from rwkv_core.training.module import History, Training

FOLDER = "saves"
"""Of the adapters, in a run's folder while it trains, and in its outputs."""

Keep = Callable[[Path, int | None], None]
"""Writes what is learned so far into an adapter file: whole, and after which step; None: the last."""


def name(step: int) -> str:
    """File of the adapter after so many optimizer steps."""
    return f"rwkv-{step}.pth"


class Plan:
    """Which adapters are kept.

    Args:
        config: what is asked for.
        epochs: of the whole run.
        steps: of the whole run.
    """

    def __init__(self, config: SavesConfig, epochs: float, steps: int) -> None:
        self._config, self._steps = config, steps
        due = set(range(config.every, steps + 1, config.every)) if config.every else set()
        if config.every_epochs:
            each = steps * config.every_epochs / epochs
            # a step that ends an epoch but for rounding ends it
            due |= {math.ceil(round(k * each, 6)) for k in range(1, int(round(steps / each, 6)) + 1)}
        self._due = sorted(due | {steps}) if config.every or config.every_epochs else []

    def concerns(self, step: int, valid: History) -> bool:
        """Whether it may be kept at all."""
        return step in valid or bisect.bisect_left(self._due, step) < bisect.bisect_right(self._due, step)

    def periodic(self, step: int, *, ended: bool = False) -> list[int]:
        """Kept after `step` steps because it was time, or because the run has `ended` there."""
        due = [s for s in self._due if s <= step]
        if ended and self._due and step not in due:
            due.append(step)
        return due if self._config.keep_last is None else due[-self._config.keep_last :]

    def best(self, step: int, valid: History, count: int) -> list[int]:
        """The `count` steps, of those until `step`, after which the held-out loss was lowest; of equals the earlier."""
        measured = [(row["loss"], s) for s, row in valid.items() if 0 < s <= step and not math.isnan(row["loss"])]
        return [s for _, s in sorted(measured)[:count]]

    def kept(self, step: int, valid: History, *, ended: bool = False) -> set[int]:
        """All that is kept after `step` steps, for people to have."""
        return {*self.periodic(step, ended=ended), *self.best(step, valid, self._config.keep_best)}

    def needed(self, step: int, valid: History, *, ended: bool = False) -> set[int]:
        """The same, and the one that the run may result in."""
        return self.kept(step, valid, ended=ended) | {*self.best(step, valid, int(self._config.result == "best"))}

    def result(self, step: int, valid: History) -> int:
        """The step whose adapter a run that ended after `step` results in. Where no held-out loss is a number, that one."""
        best = self.best(step, valid, 1) if self._config.result == "best" else []
        return best[0] if best else step


class Saves(StepCallback):
    """Writes them, into the run's folder.

    Args:
        folder: the run's.
        plan: which.
        steps: of the whole run.
        write: how.

    Raises:
        WorldError: there is no room, or no permission.
    """

    def __init__(self, folder: Path, plan: Plan, steps: int, write: Keep) -> None:
        self._folder, self._plan, self._steps, self._write = folder / FOLDER, plan, steps, write
        self._points: list[int] = []
        """Steps after which the run was saved, as far back as it may have to go."""

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Remove what comes after the step that the run continues from: it is made again."""
        for found in self._there() - set(range(step + 1)):
            self._path(found).unlink()

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Write the adapter where it is wanted, and remove those that no longer are."""
        valid = training.history["valid"]
        if not self._plan.concerns(step, valid):
            return
        ended = step == self._steps or training.ended
        needed = self._plan.needed(step, valid, ended=ended)
        if step in needed:
            self._write(self._path(step), None if ended else step)
        for found in self._there() - needed.union(*(self._plan.needed(point, valid) for point in self._points)):
            self._path(found).unlink()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the run may have to go back to: this step, or, until its checkpoint is whole, the two before."""
        self._points = [*self._points[-2:], trainer.global_step]
        checkpoint["saves"] = self._points

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self._points = list(checkpoint["saves"])

    def _there(self) -> set[int]:
        found = (re.fullmatch(r"rwkv-(\d+)\.pth", path.name) for path in self._folder.glob("*.pth"))
        return {int(match[1]) for match in found if match}

    def _path(self, step: int) -> Path:
        return self._folder / name(step)


def check(config: SavesConfig, keep: Keep | None) -> None:
    """Refuse saves that nobody writes.

    Raises:
        InputError: they are asked for, and `keep` is None.
    """
    if keep is None and config.asks:
        raise InputError("train.saves", "this training leaves no adapters", "set all of it to null, 0 and last")


def paths(folder: Path, plan: Plan, steps: int, valid: History, *, ended: bool) -> Mapping[int, Path]:
    """The files of the adapters kept of a run that ended or halted, whose folder this is, by step."""
    return {step: folder / FOLDER / name(step) for step in sorted(plan.kept(steps, valid, ended=ended))}
