"""What a run will take: memory as a sum of named terms, time, disk; and which settings would fit.

Nothing of a checkpoint is loaded but its names, shapes and dtypes. What a step allocates is told by the model itself, see
`rwkv_core.footprint`.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kernels.head_loss import scratch
from rwkv_core import checkpoint, memory, models
from rwkv_core.adapters import attach
from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.adapters.peft import all_tensors, load_library
from rwkv_core.adapters.pissa import PissaLinear
from rwkv_core.config import AdapterConfig, LoraConfig, ModelConfig, OptimizerConfig, PeftConfig, TrainConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.errors import InputError, Problem
from rwkv_core.footprint import Gpu, Heap, loss, peak, record, with_memory, without_memory
from rwkv_core.models.rwkv4 import RWKV4
from rwkv_core.models.rwkv5 import RWKV5
from rwkv_core.models.rwkv6 import RWKV6
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import RWKV, Linear, Shape
from rwkv_core.quantize import Form, Packed, QuantizedLinear
from rwkv_core.training.optimizers import build, groups, mixed

Kind = Literal["cpu", "cuda"]

RUN = 40 << 20
"""Bytes that a CPU run takes beside tensors after everything is imported: Lightning's trainer, threads, libraries' own."""

CONTEXT = 600 << 20
"""Bytes of a GPU that a process takes before its first tensor: the context, kernels and the libraries' work space."""

HOLES = 0.05
"""Share of what a GPU's tensors take that torch's allocator holds beyond them."""

_BLOCK = 256
"""Values of which bitsandbytes' 8-bit optimizers keep one scale of 4 bytes; tensors of fewer than 4096 are kept in float32."""


@dataclass(frozen=True)
class Base:
    """What a model is made of, without its values."""

    version: type[RWKV]
    shape: Shape
    dtypes: dict[str, torch.dtype]
    """Of the file's tensors; empty where there is no file."""
    name: str

    def bytes(self, parameters: int) -> int:
        """Of a checkpoint with that many values in the dtype that most of the file is in; bfloat16 where there is none."""
        return parameters * max((d.itemsize for d in self.dtypes.values()), default=2)


def base_in(path: Path, head_size_divisor: float | None = None) -> Base:
    """The model in a checkpoint, by its names and shapes alone.

    Raises:
        InputError: it is no checkpoint of RWKV-4 to 7.
    """
    tensors = checkpoint.read(path)
    version = models.version_of(tensors, path)
    try:
        shape = version.shape_of(tensors, models.divisor(path, head_size_divisor))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: {error}", f"must be a whole {version.__name__}", "give a whole checkpoint") from None
    return Base(version, shape, {name: x.dtype for name, x in tensors.items()}, str(path))


def base_named(text: str) -> Base:
    """The model of a version and sizes, as in 7:32x2560 or, with a vocabulary other than 65536, 4:24x1024x50277.

    Raises:
        InputError: it is none.
    """
    versions: dict[str, type[RWKV]] = {"4": RWKV4, "5": RWKV5, "6": RWKV6, "7": RWKV7}
    found = re.fullmatch(r"([4-7]):(\d+)x(\d+)(?:x(\d+))?", text)
    sizes = [int(found[i] or 65536) for i in (2, 3, 4)] if found else [0]
    if found is None or min(sizes) < 1 or sizes[1] % 64:
        raise InputError(f"--shape {text}", "is version:layers x width, of heads of 64", "write it as 7:32x2560")
    version = versions[found[1]]
    return Base(version, version.new_shape(sizes[0], sizes[1], 64, sizes[2]), {}, f"RWKV-{text}")


@dataclass(frozen=True)
class Room:
    """What there is to take."""

    kind: Kind
    bytes: int
    process: int
    """Bytes of a CPU's memory that the process has taken before it loads anything; 0 on a GPU."""


def here(adapter: AdapterConfig, given: int | None = None) -> Room:
    """The memory that training on this machine would have; or a card of `given` bytes."""
    if given is not None:
        return Room("cuda", given, 0)
    if adapter.kind == "peft":
        load_library()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Room("cuda", min(total, free + torch.cuda.memory_reserved()), 0)
    taken = memory.resident()
    return Room("cpu", memory.available() + taken, taken)


def longest(documents: Documents, train: TrainConfig) -> int:
    """Tokens of the longest row at most."""
    if train.rows in ("pad", "only", "chunk"):
        return min(train.ctx_len, int(np.max(documents.sizes, initial=1)))
    return min(train.ctx_len, documents.tokens)


@dataclass(frozen=True)
class Settings:
    """What memory depends on."""

    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig
    seed: int = 0
    row: int | None = None
    """Tokens of the longest row, where the data is known to have none of ctx_len."""
    world: int = 1
    """Processes that share the run."""

    @property
    def segment(self) -> int:
        """Tokens of a row that have activations at a time; the states between are kept."""
        row = self.row or self.train.ctx_len
        return min(row, self.train.context.segment or row)

    def spared(self, *, segment: int | None, grad_cp: bool) -> "Settings":
        """With another context."""
        context = self.train.context.model_copy(update={"segment": segment, "grad_cp": grad_cp})
        return replace(self, train=self.train.model_copy(update={"context": context}))


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    terms: dict[str, int]
    """Bytes by name; their sum is the peak."""
    room: Room
    trained: int
    """Values that are trained."""
    parameters: int
    """Values of the model itself."""
    disk: dict[str, int]
    """Bytes by file."""
    processes: int = 1
    """That take as much each, of the same room: those of a run on this machine's CPU."""

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.terms.values())

    @property
    def allocated(self) -> int:
        """What `training.callbacks.peak_memory_mb` will measure, in bytes: on a GPU the tensors alone."""
        return self.peak - sum(self.terms.get(name, 0) for name in _BESIDE_TENSORS)

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.peak * self.processes <= self.room.bytes


_BESIDE_TENSORS = ("GPU context", "GPU allocator")


class Unplanned(Problem):
    """A method does what its values decide, and without memory there are none."""


def predict(base: Base, settings: Settings, room: Room) -> Plan:
    """What training takes, at its peak.

    Raises:
        InputError: the method does not fit the model, as `attach`.
        Unplanned: the method needs values: some of peft's, and rows of tokens.
    """
    try:
        return _predicted(base, settings, room)
    except Problem:
        raise
    except Exception as error:  # other libraries do in Python what they like, and no run should fail by its plan
        adapter = settings.adapter
        what = f"adapter.kind = {adapter.kind}"
        if isinstance(adapter, PeftConfig):
            what = f"adapter.config.peft_type = {adapter.config['peft_type']}"
        raise Unplanned(what, "has no plan of its memory", "train, and see peak_memory_mb") from error


def _predicted(base: Base, settings: Settings, room: Room) -> Plan:
    train = settings.train
    row = settings.segment
    segments = math.ceil((settings.row or train.ctx_len) / row)
    products = mixed(train.precision)
    with without_memory():
        model, parameters = _made(base, settings)
        tokens = torch.zeros(train.micro_batch, row, dtype=torch.int64)
        trace = record(model, tokens, products)
        features = torch.empty(train.micro_batch * row, base.shape.n_embd, dtype=products or model.emb.weight.dtype)
        logits, _ = scratch(features, model.head.weight)
        state = sum(x.numel() for part in model.initial_state(1) for x in part)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = sum(x.nbytes for x in all_tensors(model)) - sum(p.nbytes for p in trained)
        moments = _moments(model, train.optimizer)
    space = Heap() if room.kind == "cpu" else Gpu()
    space.allocate(logits)
    found = peak(trace, space, train.accumulate)
    ours = sum(p.nbytes for p in trained)
    terms = {
        "frozen weights": frozen,
        "trained parameters": ours,
        "optimizer moments": moments,
        "gradients": found.gradients,
        "kept for the backward": found.kept,
        "working memory": found.working + (found.allocator - logits if room.kind == "cuda" else 0),
        "logits": logits,
        "states between rows": 4 * state * (train.micro_batch * train.accumulate if train.carry_state else 0),
        "states between segments": 4 * state * train.micro_batch * (segments - 1),
    }
    if train.parallel.shares:
        _share(terms, model, settings)
    step = sum(terms.values())
    saved = ours + moments
    if room.kind == "cpu":
        terms["allocator"] = found.allocator - logits
        terms["held-out rows"] = 16 * train.validate_rows * row  # inputs and targets, of 8 bytes a token
        terms["process"] = room.process + RUN
    else:
        terms["GPU context"], terms["GPU allocator"] = CONTEXT, int(HOLES * step)
    disk = {
        "checkpoints": 3 * saved,  # the newest, the one before, and the one being written
        "adapter": ours,
        "merged model": base.bytes(parameters),
        "exports": base.bytes(parameters) + 2 * parameters,
    }
    beside = max(1, settings.world // train.parallel.nodes) if room.kind == "cpu" else 1
    kept = {name: size for name, size in terms.items() if size}
    return Plan(kept, room, sum(map(Tensor.numel, trained)), parameters, disk, beside)


LIVE = 1_000_000_000
"""Values that stage 3 has whole at most on each process, as it was not told otherwise (stage3_max_live_parameters)."""


def _share(terms: dict[str, int], model: RWKV, settings: Settings) -> None:
    """Change what one process would take alone into what each of several does that have a share.

    By arithmetic, not by a trace: what their libraries allocate has no fake form. Sources: Rajbhandari et al. 2020, ZeRO,
    arXiv:1910.02054; deepspeed 0.19.8, stage_1_and_2.py and stage3.py; torch 2.13, FullyShardedDataParallel.
    """
    p, world = settings.train.parallel, settings.world
    half = 2 if p.stage and settings.train.precision in ("bf16", "fp16") else 1

    def share(size: int) -> int:
        return 0 if p.offloads else math.ceil(size / world)

    if p.stage:  # what its optimizer steps are float32 copies of the parameters' shares
        terms["master weights"] = share(terms["trained parameters"])
        terms["buckets"] = 2 * (p.bucket_mb << 20)  # one is filled while the other is sent
    terms["optimizer moments"] = share(terms["optimizer moments"])
    terms["trained parameters"] //= half
    gradients = terms["gradients"] // half
    terms["gradients"] = share(gradients) + (gradients if p.stage == 1 else 0)
    if p.shares_parameters:
        sizes = [sum(x.nbytes for x in (*b.parameters(), *b.buffers())) for b in model.blocks]
        whole = terms["frozen weights"] + terms["trained parameters"]
        if p.stage:
            values = sum(map(Tensor.numel, model.parameters()))
            gathered = math.ceil(whole * min(1, LIVE / values))
        else:  # all that is in no block, for the whole pass; a block, and the next one that is fetched meanwhile
            gathered = whole - sum(sizes) + sum(sorted(sizes)[-2:])
            terms["gradients"] += max(sum(x.nbytes for x in b.parameters() if x.requires_grad) for b in model.blocks)
        terms["gathered parameters"] = min(whole, gathered)
        for name in ("frozen weights", "trained parameters"):
            terms[name] = share(terms[name])


def _moments(model: RWKV, config: OptimizerConfig) -> int:
    """Bytes of what the optimizer keeps of gradients: AdamW two numbers a value, Muon one for the matrices that it is for."""
    total = 0
    for group in groups(model, config):
        for p in group["params"]:
            if config.kind.startswith("adamw_8bit") and p.numel() >= 4096:
                total += 2 * (p.numel() + 4 * math.ceil(p.numel() / _BLOCK))
            else:
                total += p.nbytes * (1 if group.get("muon") else 2)
    return total


def _made(base: Base, settings: Settings) -> tuple[RWKV, int]:
    """The model as `tasks.train` makes it, `without_memory`; and how many values it has by itself."""
    quantize = settings.model.quantize
    if quantize != "none":
        _know_levels(quantize)
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    model = base.version(base.shape, settings.model.op)
    model.adopt({name: torch.empty(x.shape, dtype=dtype) for name, x in model.state_dict().items()})
    parameters = sum(map(Tensor.numel, model.parameters()))
    if quantize != "none":
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear) and name != "head":
                model.set_submodule(name, QuantizedLinear(Packed(module.weight, quantize)))
    attach(model, _plain(settings.adapter), settings.seed)
    context = settings.train.context
    model.spare(parts=context.parts, grad_cp=context.grad_cp)
    if settings.adapter.kind == "pissa":
        for module in model.modules():
            if isinstance(module, LoraLinear):
                for part in PissaLinear.PARTS:
                    module.register_buffer(f"init_{part}", torch.empty_like(getattr(module, part)))
    return model, parameters


def _plain(adapter: AdapterConfig) -> AdapterConfig:
    """PiSSA is LoRA once it has begun, and what it begins with can't be found without values."""
    if adapter.kind != "pissa":
        return adapter
    given = adapter.model_dump(exclude={"kind", "iterations", "load_init", "load"})
    return LoraConfig(
        kind="lora", alpha=1, rank_stabilized=False, dropout=0, dora=False, load=None, **given
    )  # fmt: skip


def _know_levels(form: Form) -> None:
    """Have the tables that packing keeps be real ones, not some that have no memory."""
    with with_memory():
        Packed(torch.zeros(1, 256), form).unpacked()


def preflight(base: Base, settings: Settings, room: Room) -> Plan | None:
    """The plan of a run that is about to begin, before anything is loaded; None for a method that needs values to begin with.

    Raises:
        InputError: it can't fit, and `train.memory` is refuse.
    """
    try:
        found = predict(base, settings, room)
    except Unplanned as unplanned:
        print(unplanned, flush=True)
        return None
    if found.fits:
        return found
    largest = sorted(found.terms, key=found.terms.__getitem__, reverse=True)[:3]
    value = f"a peak of {gigabytes(found.peak)} ({', '.join(f'{n} {gigabytes(found.terms[n])}' for n in largest)})"
    rule = f"there are {gigabytes(room.bytes)} of {'memory' if room.kind == 'cpu' else 'GPU memory'}"
    if settings.train.memory == "warn":
        print(f"{value}: {rule}; train.memory = warn, so the run goes on", flush=True)
        return found
    nearest = solve(base, settings, room)
    remedy = f"set {written(changes(settings, nearest[0]))}" if nearest else "take a smaller model or a shorter ctx_len"
    raise InputError(value, rule, f"{remedy}; or train.memory: warn, if the plan is wrong")


PACKED: tuple[Form, ...] = ("int8", "nf4", "nf4-double")
"""What `solve` packs with, the most exact first."""

SHORTEST = 256
"""Tokens of a segment at least."""


def solve(base: Base, settings: Settings, room: Room) -> tuple[Settings, Plan] | None:
    """The nearest settings that fit, of the same steps: rows a step and tokens a row stay. None: none do.

    What changes nothing but the time is tried first: fewer rows at a time, then less that is kept; then what rounds the frozen
    matrices.

    Args:
        base: the model.
        settings: what was wanted.
        room: what there is.
    """
    rows = _divisors(settings.train)
    for ways in _groups(base, settings):
        found = _first_that_fits(base, [_in_rows(way, rows[0]) for way in ways], room)
        if found is not None:
            return _first_that_fits(base, [_in_rows(found[0], count) for count in reversed(rows)], room)
    return None


def _first_that_fits(base: Base, ways: Sequence[Settings], room: Room) -> tuple[Settings, Plan] | None:
    """Of settings that take less and less: a few are planned, not each."""
    best: tuple[Settings, Plan] | None = None
    low, high = 0, len(ways) - 1
    place = high
    while low <= high:
        found = predict(base, ways[place], room)
        if found.fits:
            best, high = (ways[place], found), place - 1
        elif best is None:
            return None
        else:
            low = place + 1
        place = (low + high) // 2
    return best


def _in_rows(settings: Settings, micro_batch: int) -> Settings:
    """The same steps, with other rows at a time."""
    rows = settings.train.micro_batch * settings.train.accumulate
    sizes = {"micro_batch": micro_batch, "accumulate": rows // micro_batch}
    return replace(settings, train=settings.train.model_copy(update=sizes))


def _divisors(train: TrainConfig) -> list[int]:
    """What micro_batch can be, ascending, up to what it is."""
    rows = train.micro_batch * train.accumulate
    return [count for count in range(1, train.micro_batch + 1) if rows % count == 0]


def _groups(base: Base, settings: Settings) -> Iterator[list[Settings]]:
    """Settings that take less and less, but for the rows at a time; within a group only the segments become shorter."""
    forms: list[Form] = [settings.model.quantize]
    if forms == ["none"] and _may_pack(base, settings):
        forms += PACKED
    context, length = settings.train.context, settings.segment
    rows = [context.segment]
    while context.bptt == "exact" and length >= 2 * SHORTEST:
        length = -(-length // 2)
        rows.append(length)
    for form in forms:
        model = settings.model.model_copy(update={"quantize": form})
        for again in dict.fromkeys((context.grad_cp, True)):
            yield [replace(settings.spared(segment=row, grad_cp=again), model=model) for row in rows]


def _may_pack(base: Base, settings: Settings) -> bool:
    """Whether the matrices of the blocks are frozen, and few bits of each would do."""
    packed = replace(settings, model=settings.model.model_copy(update={"quantize": "int8"}))
    try:
        with without_memory():
            _made(base, packed)
    except InputError:
        return False
    return True


def changes(old: Settings, new: Settings) -> dict[str, Any]:
    """What of params.yaml differs, by the setting's name."""
    pairs = {
        "train.micro_batch": (old.train.micro_batch, new.train.micro_batch),
        "train.accumulate": (old.train.accumulate, new.train.accumulate),
        "train.context.grad_cp": (old.train.context.grad_cp, new.train.context.grad_cp),
        "train.context.segment": (old.train.context.segment, new.train.context.segment),
        "model.quantize": (old.model.quantize, new.model.quantize),
    }
    return {name: after for name, (before, after) in pairs.items() if before != after}


def written(changed: Mapping[str, Any]) -> str:
    """Settings for a person to copy."""
    return ", ".join(f"{name}: {str(value).lower()}" for name, value in changed.items()) or "nothing: it fits"


def gigabytes(size: int) -> str:
    """As people say it."""
    return f"{size / 1e9:.2f} GB" if size >= 10_000_000 else f"{size / 1e6:.2f} MB"


_CALIBRATED = 2048
"""Tokens of a step that is timed, at most."""

_LAYERS = (1, 3)
"""Of the models that are timed."""


def tokens_per_second(base: Base, settings: Settings, room: Room) -> float | None:
    """Speed of training, from steps of models of one and of three layers at the real width; None where that is not here.

    The layers of a model take the same time each.
    """
    if room.kind == "cuda" and not torch.cuda.is_available():
        return None
    few, more = (replace(base, shape=replace(base.shape, n_layer=count)) for count in _LAYERS)
    row = min(settings.segment, _CALIBRATED)
    rows = max(1, min(settings.train.micro_batch, _CALIBRATED // row))
    adapter = settings.adapter.model_copy(update={"layers": "all"})
    train = settings.train.model_copy(update={"micro_batch": rows})
    given = replace(settings, adapter=adapter, train=train, row=row)
    if not predict(more, given, room).fits:
        return None
    one, three = (_seconds(of, given, torch.zeros(rows, row, dtype=torch.int64), room.kind) for of in (few, more))
    each = max(0.0, three - one) / (_LAYERS[1] - _LAYERS[0])
    return rows * row / (one + each * (base.shape.n_layer - _LAYERS[0]))


def _seconds(base: Base, settings: Settings, tokens: Tensor, device: str) -> float:
    """Of a training step, the fastest of three."""
    model, _ = _made(base, settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.dtype.itemsize > 1:
                p.uniform_(-0.01, 0.01, generator=torch.Generator().manual_seed(0))
    model.to(device)
    tokens = tokens.to(device)
    products, config = mixed(settings.train.precision), settings.train.optimizer.model_copy(update={"lr": 1e-9})
    optimizer = build(groups(model, config), config, scaled=settings.train.precision == "fp16")
    times = []
    with memory.reused():
        for _ in range(4):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss(model, tokens, products).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times[1:])
