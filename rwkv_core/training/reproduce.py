"""A micro-batch that did harm, kept with all that it takes to see it again: python -m rwkv_core.training.reproduce FOLDER"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from kernels.head_loss import IGNORE
from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach
from rwkv_core.config import AdapterConfig, TrainConfig
from rwkv_core.data.sampling import Batch, Group
from rwkv_core.errors import InputError, Problem
from rwkv_core.files import sha256, whole_folder, write_json
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import BlockState, State
from rwkv_core.training import parallel
from rwkv_core.training.module import Training
from rwkv_core.training.optimizers import mixed
from rwkv_core.training.parallel import Ranks

_SETTINGS, _BATCH, _TRAINED, _READ_ME = "settings.json", "micro_batch.pt", "trained.pth", "README.md"


class Measured(NamedTuple):
    """What a micro-batch does by itself."""

    loss: float
    """Its share of its step's loss."""
    grad_norm: float
    """Of that share's gradient."""
    mean: float
    """Its own weighted mean loss, in nats a token; 0, where nothing is learned."""


def measure(training: Training, batch: Batch, number: int, trainer: pl.Trainer | None = None) -> Measured:
    """Read one micro-batch forward and backward, with its own dropout. It leaves no gradient, but the lanes' states; where the
    processes share what is trained, a run that can't go on: only its checkpoint is as it was.

    Args:
        training: as it is before the step.
        batch: on its device. Where the processes share what is trained, the others' at the same time learn nothing.
        number: of the micro-batch in the run.
        trainer: that is training now; None where nobody is.
    """
    _forget(training)  # those of the step before
    training.on_train_batch_start(batch, number)
    training.step_loss = 0.0
    with torch.enable_grad():
        if trainer is not None and training.shares:
            norm = parallel.read_together(trainer, batch, number)
        else:
            with trainer.precision_plugin.train_step_context() if trainer is not None else contextlib.nullcontext():
                training.training_step(batch, number).backward()  # type: ignore[no-untyped-call]
            norm = float(training.norm_of(training.parameters())) / training.loss_factor
    _forget(training)
    weight = sum(_weight(group) for group in batch.groups)
    loss = training.step_loss
    return Measured(loss, norm, loss * batch.step_weight / weight if weight else 0.0)


def _forget(training: Training) -> None:
    """The gradients."""
    for p in training.parameters():
        p.grad = None


def _weight(group: Group) -> float:
    learned = group.targets != IGNORE
    return float(learned.sum() if group.weights is None else (group.weights * learned).sum())


def keep(
    folder: Path,
    trained: Mapping[str, Tensor],
    batch: Batch,
    lanes: State | None,
    found: Measured,
    settings: Mapping[str, Any],
) -> None:
    """Write the folder.

    Args:
        folder: to write, whole.
        trained: what `trained_state` gives, as it is before the step.
        batch: the micro-batch.
        lanes: the states it is read after, where rows go on from each other.
        found: what it does.
        settings: step, micro_batch, rank, world, what, seed, train, and made_from: None where all of the model is trained;
            else the `adapter`, and how the frozen base is loaded: `base` and `base_sha256`, `load`, keywords of `models.load`,
            and `dtype` as `checkpoint.DTYPES` has it.

    Raises:
        WorldError: there is no room, or no permission.
    """
    made = settings["made_from"]
    base = f" --base {made['base']}" if made is not None else ""
    with whole_folder(folder) as out:
        groups = [group._asdict() for group in batch.groups]
        kept = {"groups": groups, "lanes": None if lanes is None else [tuple(block) for block in lanes]}
        numbers = {name: getattr(batch, name) for name in ("step_weight", "learned", "tokens")}
        torch.save(kept | numbers, out / _BATCH)
        checkpoint.write(out / _TRAINED, {name: x.detach().cpu() for name, x in trained.items()})
        write_json(out / _SETTINGS, {**settings, "found": {name: str(x) for name, x in found._asdict().items()}})
        (out / _READ_ME).write_text(
            f"Micro-batch {settings['micro_batch']} of step {settings['step']} is in quarantine: {settings['what']}, "
            f"its loss {found.loss:.6g}, its gradient norm {found.grad_norm:.6g}.\n\n"
            f"{_BATCH}: its tokens, targets and weights. {_TRAINED}: what was trained, before the step. To see it again:\n\n"
            f"    python -m rwkv_core.training.reproduce {folder}{base}\n",
            encoding="utf-8",
        )


class Reproduced(NamedTuple):
    """What came of it this time."""

    was: dict[str, str]
    """As in the run: loss, grad_norm, mean."""
    now: Measured
    first: str | None
    """Where it went wrong first: the module whose output, or the parameter whose gradient, is not finite."""


def reproduce(folder: Path, base: Path | None) -> Reproduced:
    """Read the micro-batch again, on the CPU.

    Args:
        folder: as `keep` wrote it.
        base: the checkpoint that was trained on; None where all of it was trained, and is in the folder.

    Raises:
        InputError: a file is missing, or the base is another.
    """
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        kept = torch.load(folder / _BATCH, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(str(error.filename), "must be there", "give a folder of a run's quarantine") from None
    config = TrainConfig.model_validate(settings["train"])
    # by itself now: nobody to share with, and a gradient is as much too large as with ddp
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"strategy": "ddp"})})
    model = _model(folder, settings["made_from"], base).train()
    here = Ranks(settings["rank"], settings["world"])  # dropout is a function of them
    training = Training(model, [], config, 1, settings["seed"], here)
    if kept["lanes"] is not None:
        training.set_lanes([BlockState(*block) for block in kept["lanes"]])
    numbers = {name: kept[name] for name in ("step_weight", "learned", "tokens")}
    batch = Batch(tuple(Group(**group) for group in kept["groups"]), **numbers)
    dtype = mixed(config.precision)
    half = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with half, _watched(model) as wrong:
        found = measure(training, batch, settings["micro_batch"])
    return Reproduced(settings["found"], found, next(iter(wrong), None))


def _model(folder: Path, made: Mapping[str, Any] | None, base: Path | None) -> RWKV:
    """The model as it was before the step."""
    if made is None:
        return models.load(folder / _TRAINED)
    if base is None:
        raise InputError(f"{folder}: an adapter", "its base must be given", f"add --base {made['base']}")
    if sha256(base) != made["base_sha256"]:
        raise InputError(f"{base}", "is not the base that was trained on", f"give {made['base']} as it was then")
    adapter: AdapterConfig = TypeAdapter(AdapterConfig).validate_python(made["adapter"])
    model = models.load(base, dtype=checkpoint.DTYPES[made["dtype"]], **made["load"])
    originals = checkpoint.read(base) if made["load"]["quantize"] != "none" else None
    attach(model, adapter, 0, originals=originals, start=checkpoint.read(folder / _TRAINED))
    return model


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Gets the names of modules with an output, and of parameters with a gradient, that is not finite, as they come."""
    wrong: list[str] = []

    def look(name: str, found: Any) -> None:
        tensors = found if isinstance(found, tuple | list) else (found,)
        for x in tensors:
            if isinstance(x, tuple | list):
                look(name, x)
            elif isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all()):
                wrong.append(name)

    hooks = [
        m.register_forward_hook(lambda _m, _i, out, n=name: look(n, out)) for name, m in model.named_modules() if name
    ]
    hooks += [
        p.register_hook(lambda gradient, n=name: look(f"the gradient of {n}", gradient))  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        yield wrong
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    """Say what the micro-batch did in the run and what it does here; the status is 0 if that is the same."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_core.training.reproduce", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of a run's quarantine")
    parser.add_argument("--base", type=Path, help="the checkpoint that was trained on")
    given = parser.parse_args()
    try:
        was, now, first = reproduce(given.folder, given.base)
    except Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    for name, value in now._asdict().items():
        print(f"{name}: {value:.6g}, in the run {float(was[name]):.6g}")
    print(f"not finite first: {first or 'nothing'}")
    same = all(_same(value, float(was[name])) for name, value in now._asdict().items())
    print("reproduced" if same else "not reproduced")
    sys.exit(0 if same else 1)


def _same(a: float, b: float) -> bool:
    """To the precision that one device differs from another."""
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-2)


if __name__ == "__main__":
    main()
