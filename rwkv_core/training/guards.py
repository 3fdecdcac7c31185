"""What is watched while training, and how a run goes back to its last checkpoint and on without what harmed it.

All of a run's incidents are lines of one file in its folder, in the order they were met. They are also what the run has
decided: which rows it leaves out, and how its steps are split; so a run that was killed goes on with the same decisions.
"""

import gc
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from rwkv_core.adapters.linear import AdaptedLinear
from rwkv_core.config import TrainConfig
from rwkv_core.data.sampling import Batch, MicroBatches
from rwkv_core.errors import WorldError
from rwkv_core.files import whole_file
from rwkv_core.models.state import BlockState, State
from rwkv_core.training import parallel, reproduce
from rwkv_core.training.callbacks import StepCallback
from rwkv_core.training.module import Training
from rwkv_core.training.parallel import ALONE, Ranks

INCIDENTS = "incidents.jsonl"
"""In a run folder: a line an incident."""

QUARANTINE = "quarantine"
"""In a run folder: a folder for each micro-batch that was left out, <step>-<micro-batch>."""

What = Literal["not_finite", "spike", "blow_up", "dead_adapter", "out_of_memory"]
Action = Literal["warned", "quarantined", "went back", "replanned", "stopped"]
_SOME = 1024
"""Values of a tensor that are looked at before all of them are."""

_NOTHING = Batch((), 0, 0, 0)
"""Read while another rank reads its micro-batch, where they meet in a pass."""

_BACK = ("quarantined", "went back", "replanned")


class Incident(NamedTuple):
    """Something that should not have been."""

    step: int
    """The optimizer step it was met in, counting from 1."""
    what: What
    action: Action
    """went back: to the last checkpoint, and there it did not come again."""
    values: dict[str, Any]
    """What was measured. Of micro-batches in quarantine also `rows`, the numbers of those left out, and `kept`, their
    folders in the run's; of a new split `micro_batch` and `accumulate`. A number that is not finite is a string."""


class _Alone(NamedTuple):
    """A micro-batch that was read by itself."""

    found: reproduce.Measured
    rank: int
    """Whose it is."""
    number: int
    """Among that rank's."""
    rows: list[int]
    """Their numbers."""


class Again(Exception):
    """The run goes on from its last checkpoint."""


def read(path: Path) -> list[Incident]:
    """The incidents in a file, none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Incident(**json.loads(line)) for line in lines]


def write(path: Path, incidents: list[Incident]) -> None:
    """All incidents of a run, a line each.

    Raises:
        WorldError: there is no room, or no permission.
    """
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(x._asdict()) + "\n" for x in incidents), encoding="utf-8")


class Guards(StepCallback):
    """Looks at each step before it is recorded or saved, and decides. One for all attempts of a run in this process."""

    def __init__(
        self, folder: Path, config: TrainConfig, made_from: Mapping[str, Any] | None, here: Ranks = ALONE
    ) -> None:
        """Go by what the run has decided so far.

        Args:
            folder: the run's.
            config: as it was set.
            made_from: how the model was made, for who reproduces; see `reproduce.keep`.
            here: this process; the first of several notes what all of them see.
        """
        self._here = here
        self._folder, self._given, self._guards, self._made_from = folder, config, config.guards, made_from
        self.incidents = read(folder / INCIDENTS)
        self.began: int | None = None
        """Steps that were done when this process began."""
        self._suspect: Incident | None = None
        self._batches: MicroBatches | None = None

    @property
    def config(self) -> TrainConfig:
        """The settings, with the split of its steps that the run has come to."""
        split = next((x.values for x in reversed(self.incidents) if x.action == "replanned"), None)
        return self._given if split is None else self._given.model_copy(update=_sizes(split))

    @property
    def left_out(self) -> frozenset[int]:
        """Numbers of the rows in quarantine."""
        return frozenset(n for x in self.incidents if x.action == "quarantined" for n in x.values["rows"])

    def begin(self, batches: MicroBatches, done: int) -> None:
        """An attempt begins, after `done` steps."""
        self._batches = batches
        self.began = done if self.began is None else self.began

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count micro-batches as they are now: the checkpoint may be of another split of the same steps."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        more = checkpoint["global_step"] * self.config.accumulate - progress["current"]["ready"]
        for counts in (progress["total"], progress["current"]):
            counts.update({name: count + more for name, count in counts.items()})

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a step that something is suspected in, find what it is."""
        suspect = self._suspect
        if suspect is not None and trainer.global_step == suspect.step - 1:
            self._suspect = None
            self._find(suspect, trainer, module, batch_idx)  # type: ignore[arg-type]  # fit() trains nothing else

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """Judge the step by those before it: what is found is a function of the history, and the same after a kill."""
        training.sum_ranks()
        loss, norm, g = training.step_loss, training.grad_norm, self._guards
        if not self._finite(loss, norm):
            before = training.history["train"].get(step - 1)
            if before is None or math.isfinite(before["loss"] + before["grad_norm"]):
                self._answer(trainer, step, "not_finite", g.not_finite, {"loss": loss, "grad_norm": norm})
            return
        if not training.step_learned:
            return
        if g.dead_adapter != "ignore" and (step % g.dead_every == 0 or self._is_last(step)):
            told = {
                name
                for x in self.incidents
                if x.what == "dead_adapter" and x.step < step
                for name in x.values["matrices"]
            }
            dead = [name for name in dead_adapters(training, self._here) if name not in told]
            if dead:
                self._answer(trainer, step, "dead_adapter", g.dead_adapter, {"matrices": dead})
        if "ignore" == g.spike == g.blow_up:
            return
        recent = self._recent(training, step)
        z, times = robust_z(loss, recent["loss"]), _times(norm, recent["grad_norm"])
        if z > g.spike_z:
            self._answer(trainer, step, "spike", g.spike, {"loss": loss, "z": z})
        if times > g.blow_up_times:
            self._answer(trainer, step, "blow_up", g.blow_up, {"grad_norm": norm, "times": times})

    def out_of_memory(self, error: BaseException) -> None:
        """Split the steps into smaller micro-batches, or say why not.

        Raises:
            WorldError: they can't be smaller, or may not.
            BaseException: `error` itself, if it is another.
        """
        if not is_out_of_memory(error):
            raise error
        step, config = self._step + 1, self.config
        values: dict[str, Any] = {"error": str(error).partition("\n")[0][:200], "was": config.micro_batch}
        part = next((n for n in range(config.micro_batch // 2, 0, -1) if config.micro_batch % n == 0), None)
        if part is None or self._guards.out_of_memory == "stop" or not self._may_go_back():
            self._note(Incident(step, "out_of_memory", "stopped", values))
            raise WorldError(
                f"step {step}: {values['error']}",
                f"micro-batches of {config.micro_batch} rows of {config.ctx_len} tokens need more memory than there is",
                "lower train.micro_batch and raise train.accumulate, lower train.ctx_len, or set model.quantize"
                f"{self._spent()}",
            ) from error
        values |= {"micro_batch": part, "accumulate": config.accumulate * config.micro_batch // part}
        # the others wait for this one's part of a sum, and can't be called back; and a share is whole between two steps alone
        stops = self._here.world > 1 or config.parallel.shares
        self._note(Incident(step, "out_of_memory", "replanned", values), first=stops)
        if stops:
            raise WorldError(
                f"step {step}: {values['error']}",
                f"micro-batches of {config.micro_batch} rows need more memory than one of the processes has",
                f"run again: the run continues with micro-batches of {part}",
            ) from error

    def _finite(self, loss: float, norm: float) -> bool:
        """Whether they are no fault: a gradient that was scaled beyond the range of fp16 is none, that step is passed over."""
        return math.isfinite(loss) and (self._given.precision == "fp16" or math.isfinite(norm))

    def _is_last(self, step: int) -> bool:
        return self._batches is not None and step == self._batches.steps

    def _recent(self, training: Training, step: int) -> dict[str, list[float]]:
        """Losses and norms of the last steps; none, where they are too few to judge by."""
        history, window = training.history["train"], self._guards.window
        rows = [history[n] for n in range(step - window, step) if n in history]
        rows = [x for x in rows if x["loss"] and math.isfinite(x["loss"] + x["grad_norm"])]  # 0: nothing was learned
        enough = 2 * len(rows) > window and step > window
        return {name: [x[name] for x in rows] if enough else [] for name in ("loss", "grad_norm")}

    def _answer(self, trainer: pl.Trainer, step: int, what: What, answer: str, values: dict[str, Any]) -> None:
        """Do what the settings say.

        Raises:
            Again: the run is to go back.
            WorldError: it is to stop.
        """
        values = {name: _plain(value) for name, value in values.items()}
        if answer == "ignore":
            return
        if answer == "warn":
            self._note(Incident(step, what, "warned", values))
        elif answer == "quarantine" and self._suspect is None and self._may_go_back():
            # a suspect still there was not come back to: the same steps went another way, which going back does not help
            self._suspect = Incident(step, what, "went back", values)
            raise Again
        else:
            self._stop(step, what, values)

    def _stop(self, step: int, what: What, values: dict[str, Any]) -> None:
        incident = Incident(step, what, "stopped", values)
        self._note(incident)
        raise WorldError(f"step {step}: {_told(incident)}", _RULES[what], f"{_REMEDIES[what]}{self._spent()}")

    def _may_go_back(self) -> bool:
        return self._given.goes_back and sum(x.action in _BACK for x in self.incidents) < self._guards.attempts

    def _spent(self) -> str:
        if self._may_go_back():
            return ""
        return (
            f". The run went back {self._guards.attempts} times, as train.guards.attempts allows; more, and it goes on"
        )

    def _find(self, suspect: Incident, trainer: pl.Trainer, training: Training, first: int) -> None:
        """Read the micro-batches of the coming step one by one, and put those in quarantine that do it.

        Raises:
            Again: some did.
            WorldError: what is trained is not finite before the step.
        """
        batches = self._batches
        if batches is None:
            raise RuntimeError("there are no micro-batches; call begin() first")
        gathered = parallel.gathered(trainer, self.config, training.told)
        if self._here.most(not all(bool(x.isfinite().all()) for x in gathered.values()), training.device):
            self._stop(suspect.step, suspect.what, suspect.values | {"trained": "not finite before the step"})
        mine: list[_Alone] = []
        lanes: dict[int, State | None] = {}
        for number in self._numbers(first, training.device):
            for rank in range(self._here.world) if self._given.parallel.shares else [self._here.rank]:
                is_mine = rank == self._here.rank and number < len(batches)
                batch = move_data_to_device(batches[number], training.device) if is_mine else _NOTHING
                before = _on_cpu(training.lanes_now())
                found = reproduce.measure(training, batch, number, trainer)
                if is_mine:
                    mine.append(_Alone(found, rank, number, batches.rows_of(number)))
                    lanes[number] = before
        if mine:
            training.set_lanes(lanes[first])
        alone = [x for of_rank in self._here.all(mine) for x in of_rank]
        guilty = []
        if suspect.what == "not_finite":
            guilty = [x for x in alone if not self._finite(x.found.loss, x.found.grad_norm)]
        elif suspect.what == "spike":
            recent = self._recent(training, suspect.step)["loss"]
            if robust_z(sum(x.found.loss for x in alone), recent) > self._guards.spike_z:
                guilty = [max(alone, key=lambda x: x.found.mean)]
        else:
            guilty = [max(alone, key=lambda x: x.found.grad_norm)]
        if not guilty:  # as of a device that failed once
            self._note(suspect)
            if self._given.parallel.shares:  # whoever keeps the shares has taken these for a step
                raise Again
            return
        kept = [f"{QUARANTINE}/{suspect.step}-{x.number * self._here.world + x.rank}" for x in guilty]
        # in the order of `guilty`, which is that of the ranks: the first writes, for it has what is trained
        read = self._here.all([(batches[x.number], lanes[x.number]) for x in guilty if x.rank == self._here.rank])
        trained = {name.removeprefix("model."): x for name, x in gathered.items()}
        for x, name, (batch, before) in zip(guilty, kept, [one for of_rank in read for one in of_rank], strict=True):
            if self._here.rank:
                continue
            reproduce.keep(
                self._folder / name,
                trained,
                batch,
                before,
                x.found,
                settings={
                    "step": suspect.step,
                    "micro_batch": x.number,
                    "rank": x.rank,
                    "world": self._here.world,
                    "what": suspect.what,
                    "seed": training.seed,
                    "train": self.config.model_dump(mode="json"),
                    "made_from": self._made_from,
                },
            )
        trainer.strategy.barrier()  # nothing is noted as kept before it is
        left = {"kept": kept, "rows": [n for x in guilty for n in x.rows]}
        self._note(Incident(suspect.step, suspect.what, "quarantined", suspect.values | left))
        raise Again

    def _numbers(self, first: int, device: torch.device) -> range:
        """Of the micro-batches of the step that begins with this one: as many on each rank as the one with the most has."""
        if self._batches is None:
            raise RuntimeError("there are no micro-batches; call begin() first")
        return range(first, self._here.most(min(first + self.config.accumulate, len(self._batches)), device))

    def _note(self, incident: Incident, *, first: bool = False) -> None:
        """Say it and add it to the file, but for a warning that is there: a step that is done again meets it again.

        Args:
            incident: what all processes have met.
            first: only this one has, and it does what the first of them would.
        """
        if incident.action == "warned" and incident in self.incidents:
            return
        self.incidents.append(incident)
        if self._here.rank and not first:
            return
        print(f"step {incident.step}: {_told(incident)}: {incident.action}", file=sys.stderr, flush=True)
        write(self._folder / INCIDENTS, self.incidents)


def forget(model: torch.nn.Module) -> None:
    """Give back what a step that was broken off has left, and make the model ready for another."""
    for p in model.parameters():
        p.grad = None
    model.train()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_cpu(state: State | None) -> State | None:
    return None if state is None else [BlockState(*(x.cpu() for x in block)) for block in state]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or on the CPU, or Python got no memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "allocate memory" in str(error)
    )


def robust_z(value: float, others: list[float]) -> float:
    """Robust deviations of `value` above the median of `others`; 0, where there are none.

    A deviation is 1.4826 times the median of the absolute deviations from the median, and at least a thousandth of that: losses
    may be equal.

    Source:
        Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993, the modified z-score.
    """
    if not others:
        return 0.0
    middle = statistics.median(others)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in others)
    return (value - middle) / max(deviation, 1e-3 * abs(middle), sys.float_info.min)


def _times(value: float, others: list[float]) -> float:
    middle = statistics.median(others) if others else 0.0
    return value / middle if middle else 0.0


@torch.no_grad()
def dead_adapters(training: Training, here: Ranks = ALONE) -> list[str]:
    """Adapted matrices that the last gradient did not reach, or that it did not move: a part of theirs is still all 0.

    A part that begins at 0 has moved after a single step. What is so on one of the ranks is so: each may have a share of them.
    Where DeepSpeed keeps the gradients, nothing is said.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, module in training.model.named_modules():
        if isinstance(module, AdaptedLinear):
            parts[parallel.plain(name)] = [p for p in module.parameters() if p.requires_grad]
    trained = [p for some in parts.values() for p in some]
    if not trained or not here.most(any(p.grad is not None for p in training.parameters()), training.device):
        return []
    gradients = [p.new_zeros(1) if p.grad is None else p.grad for p in trained]
    tensors = [*gradients, *trained]
    # the first values say it, but for few; and all in one go, where a device must be waited for
    begun = torch.stack([x.flatten()[:_SOME].any() for x in tensors]).tolist()
    alive = [some or bool(x.any()) for some, x in zip(begun, tensors, strict=True)]
    alive = [bool(count) for count in here.total(alive, training.device)]
    known = iter(zip(alive[: len(trained)], alive[len(trained) :], strict=True))
    dead = []
    for name, some in parts.items():
        pairs = [next(known) for _ in some]
        if pairs and (
            not any(reached for reached, _ in pairs) or any(reached and not moved for reached, moved in pairs)
        ):
            dead.append(name)
    return dead


_RULES: dict[What, str] = {
    "not_finite": "a loss and its gradient are finite numbers",
    "spike": "a loss is near those of the steps before it",
    "blow_up": "a gradient is near those of the steps before it",
    "dead_adapter": "each adapted matrix learns",
}
_REMEDIES: dict[What, str] = {
    "not_finite": "lower the learning rate, set grad_clip, or look at the data and the base; docs/guards.md says how",
    "spike": "look at the rows of that step, lower the learning rate, or set train.guards.spike: warn",
    "blow_up": "look at the rows of that step, lower the learning rate, set grad_clip, or set train.guards.blow_up: warn",
    "dead_adapter": "leave these matrices out of adapter.targets, raise the learning rate, or train in fp32",
}


def _told(incident: Incident) -> str:
    shown = {name: value for name, value in incident.values.items() if name != "rows"}
    words = (f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {_listed(x)}" for name, x in shown.items())
    return f"{incident.what}, {', '.join(words)}"


def _listed(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")


def _plain(value: Any) -> Any:
    """As JSON has it: there is no NaN in it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _sizes(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: values[name] for name in ("micro_batch", "accumulate")}
