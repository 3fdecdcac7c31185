"""A training as a person watches it: a bar on a terminal, a line now and then in a log, and a file of one line a validation."""

import datetime
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkv_core.files import explain, whole_file
from rwkv_core.training.callbacks import Recorder, StepCallback
from rwkv_core.training.module import Training

TRAIN_LOG = "train_log.txt"
"""In a run's folder, and in its outputs."""


class Progress(StepCallback):
    """A bar on a terminal, a line now and then in a log: loss, held-out loss, learning rate, tokens a second, time left."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, recorder: Recorder, steps: int) -> None:
        self._recorder, self._steps = recorder, steps
        self._bar: Any = None
        self._first, self._began, self._shown = 0, 0.0, 0.0

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Begin at the step the run continues from."""
        self._first, self._began = step, time.monotonic()
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.add_task("train", total=self._steps, completed=step, shown="")
            self._bar.start()

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Show the step."""
        now = time.monotonic()
        if self._bar is None and now - self._shown < self.SECONDS_BETWEEN_LINES and step != self._steps:
            return
        row, valid = training.history["train"][step], training.history["valid"]
        held_out = f"{valid[max(valid)]['loss']:.4f}" if valid else "-"
        speed = f"{self._recorder.tokens_per_second:.0f}"
        shown = f"loss {row['loss']:.4f} valid {held_out} lr {row['lr']:.2e} tok/s {speed}"
        left = (now - self._began) / (step - self._first) * (self._steps - step)
        if self._bar is not None:
            self._bar.update(0, completed=step, shown=f"{shown} left {_clock(left)}")
        else:
            print(f"step {step}/{self._steps} {shown} left {_clock(left)}", flush=True)
            self._shown = now

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    # what is printed meanwhile goes above the bar, if it goes to the terminal at all
    return Progress(
        *columns, console=Console(file=sys.stderr), refresh_per_second=4, redirect_stdout=sys.stdout.isatty()
    )


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


class TrainLog(StepCallback):
    """A line for each measurement of the held-out loss: epoch, loss, perplexity, learning rate, time, step, held-out loss.

    The first five are those of RWKV-LM's file of this name, whose lines are mini-epochs: the loss is the mean over the tokens
    learned since the line before. The file is made to end where the run continues, and says that it was continued.

    Args:
        path: the file.
        epochs: of the whole run.
        steps: of the whole run.

    Raises:
        WorldError: there is no room, or no permission.
    """

    def __init__(self, path: Path, epochs: float, steps: int) -> None:
        self._path, self._epochs, self._steps = path, epochs, steps

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Drop the lines of steps that are done again, and one that a kill has torn."""
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if step and self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and (_step(line) or 0) <= step]
        kept.append(
            f"CONTINUED {_now()} after step {step}\n" if step else f"NEW RUN {_now()} {self._path.parent.name}\n"
        )
        with whole_file(self._path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Write the line of a step after which was measured."""
        train, valid = training.history["train"], training.history["valid"]
        if step not in valid:
            return
        since = max((s for s in valid if s < step), default=0)
        tokens, nats = 0.0, 0.0
        for s in range(since + 1, step + 1):
            learned = train[s]["tokens"] - (train[s - 1]["tokens"] if s > 1 else 0)
            tokens, nats = tokens + learned, nats + learned * train[s]["loss"]
        loss = nats / tokens if tokens else math.nan
        epoch = step / self._steps * self._epochs
        line = f"{epoch:.4f} {loss:.6f} {_perplexity(loss):.4f} {train[step]['lr']:.8f} {_now()} {step} "
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}{valid[step]['loss']:.6f}\n")
        except OSError as error:
            raise explain(error, self._path) from error


def _step(line: str) -> int | None:
    """Of a line; None of one that is no measurement."""
    fields = line.split()
    return int(fields[6]) if len(fields) == 8 and fields[6].isdigit() else None


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond, a float64 overflows


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
