"""The training run: set up, continued where it stopped, driven by Lightning."""

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from rwkv_core import memory
from rwkv_core.config import TrainConfig
from rwkv_core.data.rows import Rows
from rwkv_core.data.sampling import Batch, MicroBatches, extent
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import RWKV
from rwkv_core.training import optimizers, schedule
from rwkv_core.training.callbacks import LAST, Checkpoints, Log, Progress, Recorder, peak_memory_mb
from rwkv_core.training.module import History, Training


class Result(NamedTuple):
    """What a finished run has to tell; what it learned is in the model."""

    history: dict[str, History]
    """Rows of "train" (tokens, loss, lr, grad_norm) and "valid" (loss) by optimizer steps done."""
    steps: int
    tokens: int
    """Learned, each as often as it was."""
    resumed_at: int
    """Steps that were already done when this process began."""
    seconds: float
    """Time in training steps, in this process; and tokens read in it, learned or not, per second of that."""
    tokens_per_second: float
    peak_memory_mb: float


def fit(
    model: RWKV,
    groups: list[dict[str, Any]],
    train: Rows[Any],
    valid: Rows[Any],
    config: TrainConfig,
    *,
    seed: int,
    folder: Path,
    log: Log,
) -> Result:
    """Train what `groups` hold, in place.

    A run that was stopped or killed continues from `folder`/last.ckpt, and ends with the bytes of a run that was not.

    Args:
        model: in it, all that is trained requires gradients and all else does not.
        groups: optimizer parameter groups.
        train: rows to learn.
        valid: rows to measure on the way.
        config: how long, how much at a time, how fast.
        seed: of dropout; the order of the rows is `train`'s.
        folder: where the checkpoint is kept. It must belong to these settings and this data alone.
        log: is told each step's measurements.

    Raises:
        InputError: the settings do not fit each other or the data.
        Interrupted: a signal asked to stop; the run is saved.
        WorldError: the checkpoint can't be written.
    """
    whole = extent(train, config)
    batches = MicroBatches(train, config.micro_batch, config.accumulate, whole.rows)
    schedule.check(config.optimizer, batches.steps)
    training = Training(model, groups, config, batches.steps, seed)
    last = folder / LAST
    share = train.learned()
    print(
        f"{whole.epochs:.4g} epochs = {whole.steps} steps = {whole.tokens} tokens, of which "
        f"{'all' if share == 1 else f'about {share * whole.tokens:.0f}'} are learned",
        flush=True,
    )
    done = _steps_done(last)
    recorder = Recorder(batches.steps, measured(valid, config), config.validate_every, log)
    with _quiet():
        checkpoints = Checkpoints(folder, config.checkpoint_every, batches.steps)
        trainer = _trainer(config, [recorder, Progress(recorder, batches.steps), checkpoints])
    if done == batches.steps:  # killed after the last step: nothing is left to do but to take what it learned
        saved = torch.load(last, weights_only=True)
        training.load_state_dict(saved["state_dict"], strict=False)
        training.on_load_checkpoint(saved)
    else:
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=_From(done * config.accumulate, len(batches)), num_workers=0
        )
        with warnings.catch_warnings(), _quiet(), memory.reused(), optimizers.products(config.precision):
            # the loader starts where the checkpoint ends, which Lightning can't see; and it needs no workers
            warnings.filterwarnings("ignore", ".*dataloader is not resumable.*|.*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*no `val_dataloader`.*|.*isinstance.treespec.*")
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before `optimizer.step.*")  # fp16's first overflows
            trainer.fit(training, loader, ckpt_path=str(last) if done else None, weights_only=True if done else None)
    return Result(
        training.history,
        batches.steps,
        int(training.history["train"][batches.steps]["tokens"]),
        done,
        recorder.seconds,
        recorder.tokens / recorder.seconds if recorder.seconds else 0.0,
        peak_memory_mb(),
    )


def _trainer(config: TrainConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1,  # Lightning's epoch is the whole run: the rows know about ours
        accelerator="auto",
        devices=1,
        **_precision(config.precision),
        accumulate_grad_batches=config.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _precision(name: str) -> dict[str, Any]:
    """What Lightning is told. Asked by name for fp16 on a CPU, it would take bf16; its plugin can do it."""
    if name == "fp16":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {"plugins": [MixedPrecision("16-mixed", device)]}
    return {"precision": "bf16-mixed" if name == "bf16" else "32-true"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notices (devices, tips, defaults) are not about this run; its warnings stay."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def measured(valid: Rows[Any], config: TrainConfig) -> Sequence[Batch]:
    """The held-out rows that are measured during training, from the front.

    Raises:
        InputError: in none of them is anything learned.
    """
    rows = min(config.validate_rows, valid.before(1))
    batches = MicroBatches(valid, config.micro_batch, 1, rows)
    found = [batches[i] for i in range(len(batches))]
    if not sum(batch.learned for batch in found):
        raise InputError(
            f"train.validate_rows = {config.validate_rows}",
            "the first held-out rows have no token that is learned",
            "raise it, or hold out more: data.holdout.fraction",
        )
    return found


def _steps_done(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    steps = int(torch.load(checkpoint, weights_only=True, mmap=True)["global_step"])
    print(f"continuing after step {steps} ({checkpoint}, saved {time.ctime(checkpoint.stat().st_mtime)})", flush=True)
    return steps


class _From(torch.utils.data.Sampler[int]):
    """The numbers from `start` on. Its length is that of the whole run: Lightning counts those before as done."""

    def __init__(self, start: int, total: int) -> None:
        self._start, self._total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._start, self._total))

    def __len__(self) -> int:
        return self._total
