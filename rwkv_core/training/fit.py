"""The training run: set up, continued where it stopped, driven by Lightning."""

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from rwkv_core import memory
from rwkv_core.config import TrainConfig
from rwkv_core.data.rows import Rows
from rwkv_core.data.sampling import Batch, MicroBatches, extent
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import RWKV
from rwkv_core.tokenizer import Tokenizer
from rwkv_core.training import schedule
from rwkv_core.training.callbacks import LAST, Checkpoints, Log, Progress, Recorder, peak_memory_mb
from rwkv_core.training.early import StopEarly, is_over
from rwkv_core.training.guards import Again, Guards, Incident, forget
from rwkv_core.training.module import History, Training
from rwkv_core.training.samples import Samples


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
    """Time in training steps, in this process, since it last went back to a checkpoint; and tokens read in it, learned or not,
    per second of that."""
    tokens_per_second: float
    peak_memory_mb: float
    incidents: list[Incident]
    """What should not have been, and what was done about it; of all of the run."""


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
    made_from: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
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
        made_from: how the model was made, for who reproduces what a micro-batch did, see `reproduce.keep`; None where all of it
            is trained.
        tokenizer: of the model's vocabulary; only the samples need it.

    Raises:
        InputError: the settings do not fit each other or the data.
        Interrupted: a signal asked to stop; the run is saved.
        WorldError: the checkpoint can't be written; or the guards stop the run.
    """
    guards = Guards(folder, config, made_from)
    while True:
        fresh = [dict(group) for group in groups]  # an optimizer keeps its own state in them
        try:
            return _attempt(model, fresh, train, valid, guards, seed=seed, folder=folder, log=log, tokenizer=tokenizer)
        except Again:
            pass
        except (RuntimeError, MemoryError) as error:
            guards.out_of_memory(error)
        forget(model)  # outside of the handlers, where nothing holds the broken step any more


def _attempt(
    model: RWKV,
    groups: list[dict[str, Any]],
    train: Rows[Any],
    valid: Rows[Any],
    guards: Guards,
    *,
    seed: int,
    folder: Path,
    log: Log,
    tokenizer: Tokenizer | None,
) -> Result:
    """Train from the last checkpoint on, as `fit` says, until the end or until something is met."""
    config = guards.config
    whole = extent(train, config)
    batches = MicroBatches(train, config.micro_batch, config.accumulate, whole.rows, left_out=guards.left_out)
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
    guards.begin(batches, done)
    # what the callbacks need is refused before anything starts
    samples = [_samples(config, tokenizer, folder, batches.steps, seed)] if config.samples is not None else []
    recorder = Recorder(batches.steps, measured(valid, config), config.validate_every, log)
    with _quiet():
        checkpoints = Checkpoints(folder, config.checkpoint_every, batches.steps, first=config.guards.goes_back)
        watching = [guards, recorder, StopEarly(config.stop_early), Progress(recorder, batches.steps), *samples]
        trainer = _trainer(config, [*watching, checkpoints])
    saved = torch.load(last, weights_only=True, mmap=True) if last.exists() else None
    if saved is not None and not done:  # this process may have gone further, and come back
        training.load_state_dict(saved["state_dict"], strict=False)
    if saved is not None and is_over(saved["history"], done, batches.steps, config.stop_early):
        # killed after the last step: nothing is left to do but to take what it learned
        training.load_state_dict(saved["state_dict"], strict=False)
        training.on_load_checkpoint(saved)
    else:
        del saved
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=_From(done * config.accumulate, len(batches)), num_workers=0
        )
        with warnings.catch_warnings(), _quiet(), memory.reused():
            # the loader starts where the checkpoint ends, which Lightning can't see; and it needs no workers
            warnings.filterwarnings("ignore", ".*dataloader is not resumable.*|.*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*no `val_dataloader`.*|.*isinstance.treespec.*")
            trainer.fit(training, loader, ckpt_path=str(last) if done else None, weights_only=True if done else None)
    steps = max(training.history["train"])
    return Result(
        training.history,
        steps,
        int(training.history["train"][steps]["tokens"]),
        guards.began or 0,
        recorder.seconds,
        recorder.tokens / recorder.seconds if recorder.seconds else 0.0,
        peak_memory_mb(),
        guards.incidents,
    )


def _samples(config: TrainConfig, tokenizer: Tokenizer | None, folder: Path, steps: int, seed: int) -> Samples:
    if config.samples is None or tokenizer is None:
        raise InputError(
            "train.samples", "text is made of tokens by a tokenizer", "give fit() the model's, or set null"
        )
    return Samples(config.samples, tokenizer, folder, steps, config.ctx_len, seed)


def _trainer(config: TrainConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1,  # Lightning's epoch is the whole run: the rows know about ours
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        accumulate_grad_batches=config.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


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
