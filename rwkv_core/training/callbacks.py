"""What happens between the steps: they are recorded, measured, saved, and stopped when a signal asks."""

import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from rwkv_core.config import TrainConfig
from rwkv_core.data.sampling import Batch
from rwkv_core.errors import Interrupted
from rwkv_core.training import checkpoints, parallel
from rwkv_core.training.module import Training
from rwkv_core.training.parallel import Ranks

Log = Callable[[int, dict[str, float]], None]
"""Told the number of optimizer steps done, and measurements by name."""


class StepCallback(pl.Callback):
    """Is called once an optimizer step, not once a micro-batch."""

    _step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Count from where the run starts or continues."""
        self._step = trainer.global_step
        self.on_run_start(trainer, _training(module), self._step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `on_step_end` if this micro-batch was its step's last."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_step_end(trainer, _training(module), self._step)

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """The run starts, or continues, after `step` steps."""

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """`step` optimizer steps are done."""


class Recorder(StepCallback):
    """Notes each step in the history, measures the held-out loss when it is due, and passes both on."""

    def __init__(self, steps: int, valid: Sequence[Batch], validate_every: int, log: Log) -> None:
        self._steps, self._valid, self._every, self._log = steps, valid, validate_every, log
        self._began = self._in_step = 0.0
        self.seconds, self.tokens = 0.0, 0
        """Time in training steps and tokens read, in this process."""
        self.tokens_per_second = 0.0
        """Of the last step."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it."""
        self._in_step += time.perf_counter() - self._began
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Measure the untrained model, to see later what was gained."""
        self._in_step = 0.0  # a step that was broken off before may have left some
        if step == 0:
            self._validate(training, step)

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Note the step."""
        row = training.note_step(step)  # first: what the ranks have done is added up there
        self.seconds, self.tokens = self.seconds + self._in_step, self.tokens + training.step_tokens
        self.tokens_per_second, self._in_step = training.step_tokens / self._in_step, 0.0
        speed = {"tokens_per_second": self.tokens_per_second, "peak_memory_mb": peak_memory_mb()}
        self._log(step, {f"train/{name}": float(value) for name, value in (row | speed).items()})
        if step % self._every == 0 or step == self._steps:
            self._validate(training, step)

    def _validate(self, training: Training, step: int) -> None:
        loss = training.held_out_loss(self._valid)
        training.history["valid"][step] = {"loss": loss}
        self._log(step, {"valid/loss": loss})


def peak_memory_mb() -> float:
    """Largest memory so far, in MB: of the GPU where one is used, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    # not ru_maxrss where it can be had: that counts the memory of the process that started this one too
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / 1e6


class Listener(pl.Callback):
    """Listens for signals that ask to stop. The first of the callbacks: they come at any time from here on."""

    def __init__(self, ask: Callable[[int, FrameType | None], None]) -> None:
        self._ask = ask

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen for Ctrl+C and for termination, in place of Lightning, which would leave a step half done; and for SIGUSR1, by
        which Slurm's srun is had to ask, see tasks/stage.py.

        Lightning has noted who listened before the run, and gives the signals back to them after it. Only a process's main
        thread may listen; a run in another one is stopped by whoever started it.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)


class Checkpoints(StepCallback):
    """Saves the run every so many steps and when a signal asks it to stop, always between two steps; and before the first one,
    where the run may go back to it.

    A signal may reach any of the ranks: all of them stop after the same step.

    Args:
        folder: the run's, named after the digest of all that its result depends on.
        config: of the run.
        steps: of the whole run.
        here: this process among those that share the run.
        run: its id, where it has one.
    """

    def __init__(self, folder: Path, config: TrainConfig, steps: int, here: Ranks, run: str | None) -> None:
        self._folder, self._config, self._steps, self._here, self._run = folder, config, steps, here, run
        self._signal: int | None = None

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Save what the run begins from."""
        if step == 0 and self._config.goes_back:
            parallel.save(trainer, self._config, self._folder)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal asks to stop."""
        if self._signal is not None and number == signal.SIGUSR1:  # Slurm has told all processes already
            return
        if self._signal is not None:  # asked twice: the last checkpoint is whole, so leave at once
            raise Interrupted(number, f"stopped at once; run again and it continues from {self._folder}")
        self._signal = number
        print("stopping after this step; a second signal stops at once", file=sys.stderr, flush=True)

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Save where it is time, and stop where a signal asked."""
        asked = self._here.most(self._signal or 0, training.device)
        if step % self._config.checkpoint_every == 0 or step == self._steps or asked or trainer.should_stop:
            parallel.save(trainer, self._config, self._folder)
        if asked:
            raise Interrupted(asked, f"stopped and saved after step {step} of {self._steps}; run again to continue")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave in the model what was learned, whole."""
        parallel.leave_whole(trainer, self._config, _training(module).trained)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say whose it is, and where the random generators are."""
        checkpoint |= {
            "digest": self._folder.name,
            "run": self._run,
            "random": checkpoints.random_states(),
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        checkpoints.set_random_states(checkpoint["random"])


def _training(module: pl.LightningModule) -> Training:
    if not isinstance(module, Training):
        raise TypeError(f"{type(module).__name__} is trained; these callbacks serve Training; use them through fit()")
    return module
