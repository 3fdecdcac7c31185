"""A sweep: its space, its arms, what each came to. An arm is one choice of values, trained apart as a DVC experiment.

All that a sweep knows lies in files under .rwkvflow/sweeps/<name>/, each written whole. The same sweep run again goes on from
them, and does only what is missing.
"""

import hashlib
import itertools
import json
import math
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import Field, model_validator

from flows import experiment, graph
from rwkv_core.config.section import Config
from rwkv_core.errors import InputError, Problem, WorldError
from rwkv_core.files import whole_file, write_json
from tasks import params, stage
from tasks.record import SWEEP, SWEEP_NAME, RunRecord, main_root

SWEEPS = Path(".rwkvflow/sweeps")
"""What sweeps have come to, in the main checkout."""

LENGTH = "train.halt"
"""What successive halving sets."""

_POLL = 1.0  # seconds
_TRIES = 2  # of an arm that crashes: it goes on from its checkpoint

Value = Any  # of a parameter: whatever YAML can say


class Range(Config):
    """Values that are drawn from."""

    low: float | None = None
    """The least."""
    high: float | None = None
    """The greatest."""
    log: bool = False
    """Each order of magnitude is as likely as another."""
    integer: bool = False
    """Whole numbers only, low and high included."""
    choices: list[Value] | None = None
    """These, each as likely, instead of low and high."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("has either choices, or low and high")
        if (
            self.low is not None
            and self.high is not None
            and not (self.low < self.high and (self.low > 0 or not self.log))
        ):
            raise ValueError("low must be below high, and above 0 with log")
        return self

    def draw(self, source: random.Random) -> Value:
        """One value."""
        if self.choices is not None or self.low is None or self.high is None:
            return source.choice(self.choices or [])
        low, high = (self.low - 0.5, self.high + 0.5) if self.integer and not self.log else (self.low, self.high)
        drawn = math.exp(source.uniform(math.log(low), math.log(high))) if self.log else source.uniform(low, high)
        return round(drawn) if self.integer else float(f"{drawn:.4g}")


class Random(Config):
    """Arms whose values are drawn."""

    count: int = Field(ge=1)
    """How many; of each combination of the grid, if there is one. More of them begin with the same."""
    seed: int = Field(ge=0)
    """Equal seeds, equal arms."""
    space: dict[str, Range] = Field(min_length=1)
    """From what, by dotted name: {train.optimizer.lr: {low: 1e-4, high: 1e-2, log: true}}."""


class Halving(Config):
    """Successive halving: all arms train for a little, the best go on, each time for longer; the last to its end."""

    first: int = Field(ge=1)
    """How far all arms go."""
    unit: Literal["steps", "tokens"]
    """Of `first`: optimizer steps, or tokens, where arms have steps of different sizes."""
    factor: int = Field(ge=2)
    """One in so many goes on, so many times as far."""


class Sweep(Config):
    """Which values to try, and how."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,60}$")]
    """Begins the names of its experiments. Another sweep needs another."""
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default={})
    """All combinations of these values, by dotted name: {adapter.rank: [4, 16]}."""
    random: Random | None = None
    """Values that are drawn; null: none."""
    fixed: dict[str, Value] = Field(default={})
    """Values of all arms, where they differ from params.yaml."""
    halving: Halving | None = None
    """Stop early what is worse than the rest; null: all arms train to their ends."""
    target: str = "train"
    """The stage that each arm is brought up to date for; evaluate, for each arm's report."""
    slots: int = Field(default=1, ge=1)
    """Arms at a time. Each has a GPU of its own as far as there are some."""

    @model_validator(mode="after")
    def _something_to_try(self) -> Self:
        names = [*self.grid, *(self.random.space if self.random else ()), *self.fixed]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is in two of grid, random and fixed")
        if not self.grid and self.random is None:
            raise ValueError("there is nothing to try: give grid or random")
        if self.halving is not None and LENGTH in names:
            raise ValueError(f"halving sets {LENGTH}")
        return self

    def arms(self) -> list["Arm"]:
        """All of them, each once."""
        combinations = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        found: dict[str, Arm] = {}
        for at, combination in enumerate(combinations):
            for number in range(self.random.count if self.random else 1):
                drawn = {}
                if self.random is not None:
                    source = random.Random(f"{self.random.seed} {at} {number}")
                    drawn = {name: values.draw(source) for name, values in self.random.space.items()}
                arm = Arm(self.name, combination | drawn, self.fixed)
                found[arm.name] = arm
        return list(found.values())


@dataclass(frozen=True)
class Arm:
    """One choice of values."""

    sweep: str
    chosen: Mapping[str, Value]
    """What it differs from other arms in, by dotted name."""
    fixed: Mapping[str, Value]

    @property
    def values(self) -> dict[str, Value]:
        """All that is not as in params.yaml."""
        return {**self.fixed, **self.chosen}

    @property
    def name(self) -> str:
        """Of its experiment: a function of its values."""
        return f"{self.sweep}-{_digest(self.values)}"

    @property
    def inputs(self) -> dict[str, Value]:
        """Those of its values that decide what it is trained on."""
        return {name: value for name, value in self.values.items() if name.startswith("data") or name == "model.base"}


class Result(NamedTuple):
    """What an arm came to, as far as it went."""

    loss: float
    """Held-out, nats a token."""
    memory_mb: float
    """Peak."""
    seconds: float
    """In training steps, from the first on."""
    adapter_bytes: int
    steps: int
    tokens: int
    run: str
    """Id of its record; MLflow's tag rwkvflow.run."""
    revision: str
    """Of its experiment."""


class Told(NamedTuple):
    """All that is known of an arm."""

    arm: Arm
    result: Result | None
    """As far as it went last; None if it failed before it came to anything."""
    failed: str | None
    """Why it could not go on."""
    rung: int
    """How often it was let go on."""
    whole: bool
    """It was let go to its end."""


class Stopped(Exception):
    """The sweep was asked to stop; the same again goes on from there."""


Card = AbstractContextManager[Mapping[str, str] | None]
Start = Callable[["Job"], Any]
"""Runs a job beside the caller: it calls `Job.run`, once."""


@dataclass(frozen=True)
class Job:
    """An arm on its way to the next rung, with a slot for itself."""

    state: "State"
    arm: Arm
    halt: int | None
    slot: int
    free: "queue.Queue[int]"
    stop: threading.Event

    def run(self, log: Callable[[str], None], card: Callable[[], Card] = nullcontext) -> str | None:
        """Train the arm, note what it came to, and give the slot back.

        Args:
            log: is given each line.
            card: waits for what else the arm must have, and yields variables for its stages, if any.

        Returns:
            Why it failed; None if it did not.

        Raises:
            StoppedError: it was asked to stop, and has saved.
        """
        try:
            with card() as held:
                result = self._train(log, held or _card(self.slot))
            self.state.note(self.arm, self.halt, result=result)
        except graph.StoppedError:
            raise
        except (graph.StageError, Problem) as failure:
            self.state.note(self.arm, self.halt, failed=str(failure))
            return str(failure)
        except Exception as error:
            self.state.note(self.arm, self.halt, failed=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.free.put(self.slot)  # when all are back, all is noted
        return None

    def _train(self, log: Callable[[str], None], card: Mapping[str, str]) -> Result:
        state, arm = self.state, self.arm
        values = arm.values | ({LENGTH: self.halt} if state.sweep.halving else {})
        begun = state.prepared(arm)
        with experiment.checkout(state.root, arm.name, values, begun=begun) as folder:
            told = {
                **state.environment,
                **experiment.environment(folder, arm.name),
                SWEEP: state.id,
                SWEEP_NAME: state.sweep.name,
                **card,
            }
            for left in reversed(range(_TRIES)):
                try:
                    target = state.sweep.target
                    graph.reproduce(target, log, root=folder, needs=True, environment=told, stop=self.stop)
                    break
                except graph.StageError as failure:
                    if not (left and failure.crashed):
                        raise
                    log(f"{failure}; once more")
            return _result(folder, experiment.save(folder, arm.name))


class State:
    """What a sweep has come to, in its folder. One process at a time has it.

    Args:
        root: the working copy.
        sweep: which.
        environment: variables for the stages, beside this process's own.

    Raises:
        InputError: a value of an arm is not valid, all arms looked at before any runs.
        WorldError: another process runs this sweep.
    """

    def __init__(self, root: Path, sweep: Sweep, environment: Mapping[str, str] | None = None) -> None:
        self.root, self.sweep, self.arms, self.environment = root.resolve(), sweep, sweep.arms(), environment or {}
        self._folder = main_root(root) / SWEEPS / sweep.name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._folder / "lock", thread_local=False)
        self._head = self._folder / "sweep.json"

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise WorldError(
                f"sweep {self.sweep.name}", "another process runs it", "wait until it has ended, or take another name"
            ) from None
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _begin(self) -> None:
        if self._head.exists():
            self._facts = json.loads(self._head.read_text(encoding="utf-8"))
        else:
            self._facts = {"id": uuid4().hex, "begun": experiment.snapshot(self.root), "prepared": {}}
        text = experiment.text_of(self.root, self._facts["begun"])
        for arm in self.arms:
            experiment.overridden(text, arm.values)
        self._keep()

    def _keep(self) -> None:
        for name, revision in {"begun": self._facts["begun"], **self._facts["prepared"]}.items():
            experiment.hold(self.root, f"{self.sweep.name}/{name}", revision)
        with whole_file(self._head) as temporary:
            write_json(temporary, self._facts)

    @property
    def id(self) -> str:
        """Of the sweep; its run in MLflow is found by it."""
        return str(self._facts["id"])

    def prepared(self, arm: Arm) -> str:
        """The revision that an arm begins with: what it is trained on is made already."""
        return str(self._facts["prepared"][_digest(arm.inputs)])

    def prepare(self, log: Callable[[str], None], stop: threading.Event) -> None:
        """Make what arms are trained on, once for all arms that are trained on the same.

        Raises:
            StageError, StoppedError: as `graph.reproduce`.
        """
        for inputs in {_digest(arm.inputs): arm.inputs for arm in self.arms}.values():
            key = _digest(inputs)
            if key in self._facts["prepared"]:
                continue
            name = f"{self.sweep.name}-data-{key}"
            with experiment.checkout(self.root, name, inputs, begun=self._facts["begun"]) as folder:
                *needs, _ = graph.plan(["train"], folder)
                for need in needs:
                    graph.reproduce(need.name, log, root=folder, environment=self.environment, stop=stop)
                self._facts["prepared"][key] = experiment.snapshot(folder)
                self._keep()
            experiment.remove(self.root, name)

    def note(self, arm: Arm, halt: int | None, *, result: Result | None = None, failed: str | None = None) -> None:
        """Keep what an arm came to."""
        known = self._read(arm)
        if result is not None:
            known["rungs"][_rung(halt)] = result._asdict()
        known["failed"] = failed
        with whole_file(self._file(arm)) as temporary:
            write_json(temporary, {"values": arm.values, **known})

    def done(self, arm: Arm, halt: int | None) -> Result | None:
        """What an arm came to after so many steps, or at its end; None if it has not got there."""
        found = self._read(arm)["rungs"].get(_rung(halt))
        return Result(**found) if found else None

    def failed(self, arm: Arm) -> str | None:
        """Why it could not go on."""
        found = self._read(arm)["failed"]
        return None if found is None else str(found)

    def _read(self, arm: Arm) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            return dict(json.loads(self._file(arm).read_text(encoding="utf-8")))
        return {"rungs": {}, "failed": None}

    def _file(self, arm: Arm) -> Path:
        return self._folder / "arms" / f"{arm.name}.json"

    def rungs(self) -> Iterator[tuple[int, Callable[[Arm], int | None]]]:
        """How many arms go on, and until which step each: None is its end."""
        count, halving = len(self.arms), self.sweep.halving
        text = experiment.text_of(self.root, self._facts["begun"])
        configs = {arm.name: params.check(experiment.overridden(text, arm.values), arm.name).train for arm in self.arms}
        amount = halving.first if halving else 0
        while halving is not None and count > 1:

            def until(arm: Arm, amount: int = amount) -> int:
                config = configs[arm.name]
                each = config.ctx_len * config.micro_batch * config.accumulate if halving.unit == "tokens" else 1
                every = config.validate_every
                return math.ceil(amount / each / every) * every

            yield count, until
            count, amount = max(1, count // halving.factor), amount * halving.factor
        yield count, lambda arm: None


def run(
    state: State, start: Start, say: Callable[[str], None], asked: Callable[[], bool], stop: threading.Event
) -> list[Told]:
    """Bring a sweep to its end.

    Args:
        state: of the sweep.
        start: runs a job beside this.
        say: is given a line now and then.
        asked: whether to stop.
        stop: is set then, for the arms.

    Returns:
        What is known of all arms, the best first.

    Raises:
        Stopped: it was asked to, and all that ran has saved.
        StageError: what arms are trained on can't be made.
    """
    state.prepare(say, stop)
    alive, told = list(state.arms), dict[str, Told]()
    for number, (count, until) in enumerate(state.rungs()):
        alive = alive[:count]
        halts = {arm.name: until(arm) for arm in alive}
        missing = [arm for arm in alive if state.done(arm, halts[arm.name]) is None]
        steps = sorted({halt for halt in halts.values() if halt is not None})
        length = f"for {' or '.join(map(str, steps))} steps" if steps else "to the end"
        say(f"{len(alive)} arms {length}, {len(missing)} of them still to do, {state.sweep.slots} at a time")
        _all(state, missing, halts, start, asked, stop)
        results = []
        for arm in alive:
            result = state.done(arm, halts[arm.name])
            failed = None if result else state.failed(arm)
            before = told.get(arm.name)
            shown = result or (before.result if before else None)
            told[arm.name] = Told(arm, shown, failed, number, halts[arm.name] is None and result is not None)
            if result is not None:
                results.append((math.inf if math.isnan(result.loss) else result.loss, arm.name, arm))
        alive = [arm for _, _, arm in sorted(results, key=lambda entry: entry[:2])]
    return sorted(
        told.values(), key=lambda t: (-t.rung, t.result is None, t.result.loss if t.result else 0, t.arm.name)
    )


def _all(
    state: State,
    arms: Sequence[Arm],
    halts: Mapping[str, int | None],
    start: Start,
    asked: Callable[[], bool],
    stop: threading.Event,
) -> None:
    free: queue.Queue[int] = queue.Queue()
    for slot in range(state.sweep.slots):
        free.put(slot)

    def take() -> int:
        while True:
            if asked():
                stop.set()
            with suppress(queue.Empty):
                return free.get(timeout=_POLL)

    for arm in arms:
        taken = take()
        if stop.is_set():
            free.put(taken)
            break
        start(Job(state, arm, halts[arm.name], taken, free, stop))
    for _ in range(state.sweep.slots):  # until all have ended
        take()
    if stop.is_set():
        raise Stopped(
            f"sweep {state.sweep.name}: stopped; what ran has saved, and the same sweep again goes on from there"
        )


def beside(executor: ThreadPoolExecutor, say: Callable[[str], None]) -> Start:
    """Jobs in threads. What they print is in their logs, and of each it is said how it ended."""

    def work(job: Job) -> None:
        values = ", ".join(f"{name} {value}" for name, value in job.arm.chosen.items())
        try:
            failure = job.run(lambda line: None)
        except graph.StoppedError:
            return
        result = job.state.done(job.arm, job.halt)
        came_to = f"held-out loss {result.loss:.4f} after {result.steps} steps" if result else failure
        say(f"{job.arm.name} ({values}): {came_to}")

    return lambda job: executor.submit(work, job)


def _result(folder: Path, revision: str) -> Result:
    train = folder / stage.TRAIN
    measured = json.loads((train / "metrics.json").read_text(encoding="utf-8"))
    record = RunRecord.read(train)
    return Result(
        loss=measured["valid_loss"],
        memory_mb=measured["peak_memory_mb"],
        seconds=round(record.seconds_trained, 1),
        adapter_bytes=(folder / stage.ADAPTER).stat().st_size,
        steps=measured["steps"],
        tokens=measured["tokens"],
        run=record.id,
        revision=revision,
    )


def _card(slot: int) -> dict[str, str]:
    """The GPU that a slot has, by the number that CUDA gives it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    cards = [card for card in given.split(",") if card] if given is not None else list(map(str, range(len(there))))
    return {"CUDA_VISIBLE_DEVICES": cards[slot % len(cards)]} if cards else {}


def _rung(halt: int | None) -> str:
    return "end" if halt is None else str(halt)


def _digest(values: Mapping[str, Value]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def read(path: Path) -> Sweep:
    """The sweep in a file.

    Raises:
        InputError: it is missing, or not valid.
    """
    if not path.is_file():
        raise InputError(str(path), "there is no such file", "name the YAML file that says what to try")
    return params.read(path, Sweep)
