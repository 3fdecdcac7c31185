"""The training run: set up, continued where it stopped, driven by Lightning."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from rwkv_core.tokenizer import Tokenizer
from rwkv_core.training import context, optimizers, parallel, saves, schedule
from rwkv_core.training.callbacks import Checkpoints, Listener, Log, Recorder, peak_memory_mb
from rwkv_core.training.checkpoints import CheckpointFile, latest, summary
from rwkv_core.training.early import StopEarly, is_over
from rwkv_core.training.guards import Again, Guards, Incident, forget
from rwkv_core.training.module import History, Training
from rwkv_core.training.parallel import ALONE, Ranks
from rwkv_core.training.progress import TRAIN_LOG, Progress, TrainLog
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
    epochs: float
    kept: Mapping[int, Path]
    """Adapters kept on the way, by the steps that were done."""
    best: Path | None
    """The adapter that the run results in, where it is not that of the last step, which is in the model."""
    step: int
    """Steps that were done when the run was what it results in."""
    halted: bool
    """It is not over: with a later config.halt it goes on."""
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
    here: Ranks = ALONE,
    keep: saves.Keep | None = None,
    run: str | None = None,
    made_from: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Result:
    """Train what `groups` hold, in place.

    A run that was stopped or killed continues from the newest whole checkpoint in `folder`, and ends with the bytes of one
    that was not.

    Args:
        model: in it, all that is trained requires gradients and all else does not.
        groups: optimizer parameter groups.
        train: rows to learn.
        valid: rows to measure on the way.
        config: how long, how much at a time, how fast.
        seed: of dropout; the order of the rows is `train`'s.
        folder: where checkpoints, train_log.txt and, on the way, saves/ are kept. Its name must belong to these settings and
            this data alone.
        log: is told each step's measurements, on the first rank.
        here: this process among those that share the run; Lightning starts the others.
        keep: writes what was learned as an adapter, for config.saves.
        run: the run's id, which its checkpoints remember.
        made_from: how the model was made, for who reproduces what a micro-batch did, see `reproduce.keep`; None where all of it
            is trained.
        tokenizer: of the model's vocabulary; only the samples need it.

    Raises:
        InputError: the settings do not fit each other or the data.
        Interrupted: a signal asked to stop; the run is saved.
        WorldError: the checkpoint can't be written; or the guards stop the run.
    """
    if here.rank == 0:
        saves.check(config.saves, keep)
    if train.lanes % here.world:
        raise InputError(
            f"rows in {train.lanes} lanes",
            f"{here.world} processes share them, and a lane's state is with one of them",
            "make the rows for as many processes",
        )
    guards = Guards(folder, config, made_from, here)
    attempt = functools.partial(
        _attempt, model, train, valid, guards, seed=seed, folder=folder, log=log, here=here, keep=keep, run=run,
        tokenizer=tokenizer,
    )  # fmt: skip
    while True:
        try:
            return attempt([dict(group) for group in groups])  # an optimizer keeps its own state in them
        except Again:
            pass
        except (RuntimeError, MemoryError) as error:
            guards.out_of_memory(error)
        forget(model)  # outside of the handlers, where nothing holds the broken step any more


def _attempt(
    model: RWKV,
    train: Rows[Any],
    valid: Rows[Any],
    guards: Guards,
    groups: list[dict[str, Any]],
    *,
    seed: int,
    folder: Path,
    log: Log,
    here: Ranks,
    keep: saves.Keep | None,
    run: str | None,
    tokenizer: Tokenizer | None,
) -> Result:
    """Train from the last checkpoint on, as `fit` says, until the end or until something is met."""
    config = guards.config
    whole = extent(train, config, here.world)
    batches = MicroBatches(
        train,
        config.micro_batch,
        config.accumulate,
        whole.rows,
        **here._asdict(),
        full=config.parallel.stage > 0,
        left_out=guards.left_out,
    )
    schedule.check(config.optimizer, batches.steps)
    context.check(config.context, batches.steps)
    training = Training(model, groups, config, batches.steps, seed, here)
    plan = saves.Plan(config.saves, whole.epochs, batches.steps)
    share = train.learned()
    print(
        f"{whole.epochs:.4g} epochs = {whole.steps} steps = {whole.tokens} tokens, of which "
        f"{'all' if share == 1 else f'about {share * whole.tokens:.0f}'} are learned",
        flush=True,
    )
    last, done = latest(folder)
    if config.halt is not None and done > config.halt:
        raise InputError(
            f"train.halt = {config.halt}", f"the run has gone on until step {done}", "set a later one, or null"
        )
    guards.begin(batches, done)
    # what the callbacks need is refused before anything starts
    samples = [_samples(config, tokenizer, folder, batches.steps, seed)] if config.samples is not None else []
    recorder = Recorder(batches.steps, measured(valid, config, here), config.validate_every, log)
    with _quiet():
        checkpoints = Checkpoints(folder, config, batches.steps, here, run)
        callbacks: list[pl.Callback] = [
            Listener(checkpoints.ask),
            guards,
            recorder,
            StopEarly(config.stop_early, config.halt),
            *samples,
        ]
        if here.rank == 0:
            callbacks += [Progress(recorder, batches.steps), TrainLog(folder / TRAIN_LOG, whole.epochs, batches.steps)]
            if keep is not None:
                callbacks.append(saves.Saves(folder, plan, batches.steps, keep))
        trainer = _trainer(config, [*callbacks, checkpoints], here)  # the checkpoints come after all else of a step
    saved = torch.load(summary(last), weights_only=True, mmap=True) if last is not None else None
    if saved is not None and not done:  # this process may have gone further, and come back
        training.load_state_dict(saved["state_dict"], strict=False)
    if saved is not None and (done == config.halt or is_over(saved["history"], done, batches.steps, config.stop_early)):
        # it halted here, or was killed after the last step: nothing is left to do but to take what it learned
        training.load_state_dict(saved["state_dict"], strict=False)
        training.on_load_checkpoint(saved)
    else:
        del saved
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=_From(done * config.accumulate, len(batches)), num_workers=0
        )
        with warnings.catch_warnings(), _quiet(), memory.reused(), optimizers.products(config.precision):
            # the loader starts where the checkpoint ends, which Lightning can't see; and it needs no workers
            warnings.filterwarnings("ignore", ".*dataloader is not resumable.*|.*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*no `val_dataloader`.*|.*isinstance.treespec.*")
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before `optimizer.step.*")  # fp16's first overflows
            try:
                trainer.fit(training, loader, ckpt_path=last if done else None, weights_only=True if done else None)
            except Again:
                parallel.take_back(trainer, training, config)
                raise
    steps, measurements = max(training.history["train"]), training.history["valid"]
    step = plan.result(steps, measurements)
    halted = not is_over(training.history, steps, batches.steps, config.stop_early)
    return Result(
        training.history,
        steps,
        int(training.history["train"][steps]["tokens"]),
        guards.began or 0,
        recorder.seconds,
        recorder.tokens / recorder.seconds if recorder.seconds else 0.0,
        peak_memory_mb(),
        whole.epochs * steps / batches.steps,
        saves.paths(folder, plan, steps, measurements, ended=not halted),
        folder / saves.FOLDER / saves.name(step) if step != steps else None,
        step,
        halted,
        guards.incidents,
    )


def _samples(config: TrainConfig, tokenizer: Tokenizer | None, folder: Path, steps: int, seed: int) -> Samples:
    if config.samples is None or tokenizer is None:
        raise InputError(
            "train.samples", "text is made of tokens by a tokenizer", "give fit() the model's, or set null"
        )
    return Samples(config.samples, tokenizer, folder, steps, config.ctx_len, seed)


def _trainer(config: TrainConfig, callbacks: list[pl.Callback], here: Ranks) -> pl.Trainer:
    return parallel.trainer(
        config,
        here,
        max_epochs=1,  # Lightning's epoch is the whole run: the rows know about ours
        **_precision(config),
        accumulate_grad_batches=config.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _precision(config: TrainConfig) -> dict[str, Any]:
    """What Lightning is told. Asked by name for fp16 on a CPU, it would take bf16; its plugin can do it."""
    if config.precision == "fp16" and not config.parallel.stage:  # DeepSpeed scales the loss itself
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {"plugins": [CheckpointFile(), MixedPrecision("16-mixed", device)]}
    plugins = [] if config.parallel.stage else [CheckpointFile()]  # DeepSpeed has its own, of many files
    return {
        "plugins": plugins,
        "precision": {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(config.precision, "32-true"),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notices (devices, tips, defaults) are not about this run; its warnings stay."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric.utilities.distributed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def measured(valid: Rows[Any], config: TrainConfig, here: Ranks = ALONE) -> Sequence[Batch]:
    """This rank's of the held-out rows that are measured during training, from the front.

    Raises:
        InputError: in none of them, on any rank, is anything learned.
    """
    rows = min(config.validate_rows, valid.before(1))
    batches = MicroBatches(valid, config.micro_batch, 1, rows, **here._asdict())
    found = [batches[i] for i in range(len(batches))]
    if not any(batch.step_weight for batch in found):
        raise InputError(
            f"train.validate_rows = {config.validate_rows}",
            "the first held-out rows have no token that is learned",
            "raise it, or hold out more: data.holdout.fraction",
        )
    return found


class _From(torch.utils.data.Sampler[int]):
    """The numbers from `start` on. Its length is that of the whole run: Lightning counts those before as done."""

    def __init__(self, start: int, total: int) -> None:
        self._start, self._total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._start, self._total))

    def __len__(self) -> int:
        return self._total
