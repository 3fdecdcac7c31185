"""train: an adapter is fitted to the training rows, beside a frozen base."""

import contextlib
import csv
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rwkv_core import checkpoint, models, plan, warm_start
from rwkv_core.adapters import attach, trained_state
from rwkv_core.adapters.file import AdapterRecord, write
from rwkv_core.adapters.rows import without_unchanged
from rwkv_core.data.binidx import SIDES, Documents
from rwkv_core.data.order import Part
from rwkv_core.data.rows import LeftOut, rows
from rwkv_core.errors import InputError, Problem
from rwkv_core.files import sha256, whole_file, whole_folder, write_json
from rwkv_core.tokenizer import named
from rwkv_core.training import checkpoints, guards, parallel, saves
from rwkv_core.training.fit import Result, fit
from rwkv_core.training.module import History
from rwkv_core.training.optimizers import groups
from rwkv_core.training.progress import TRAIN_LOG
from rwkv_core.training.samples import SAMPLES
from tasks import loggers, mirror, stage, tracking
from tasks.params import Params, load
from tasks.record import FILE, RunRecord, main_root

START = Path("start")
"""Where adapters lie that a run goes on from. dvc.yaml can't name a file that may be none: the folder is the dependency."""


def train() -> None:
    """Base and outputs/data -> outputs/train: adapter.pth, saves, histories, train_log.txt, incidents.jsonl, samples.jsonl,
    metrics.json, run.json.

    A run that was stopped or killed continues from its last checkpoint. One with other settings, data or base does not: the
    folder of the checkpoint is named after all of them. Where several processes share the run, each is in here, and the first
    writes.
    """
    params = load()
    loggers.check(params.tracking)
    here = parallel.ranks(params.train.parallel)
    after_state = params.adapter.state != "none"
    parallel.check(
        params.train,
        bridged=params.adapter.kind == "peft",
        after_state=after_state,
        quantized=params.model.quantize != "none",
    )
    manifest = json.loads(stage.MANIFEST.read_text(encoding="utf-8"))
    base_sha256 = sha256(params.model.base)
    _check_place(params.adapter.load)
    start = warm_start.read(params.adapter, params.model.base, base_sha256, params.model.quantize)
    loaded = warm_start.digests(params.adapter)
    parts = [Part(*(part[field] for field in Part._fields)) for part in manifest["train"].get("parts", ())]
    data = token_files()
    digest = run_digest(params, base_sha256, loaded, data, parts, here.world)
    folder = main_root(Path.cwd()) / tracking.RUNS / digest
    folder.mkdir(parents=True, exist_ok=True)

    if not here.rank:  # the others send nothing
        tracking.load_libraries()
    predicted = plan.preflight(
        plan.base_in(params.model.base, params.model.head_size_divisor),
        plan.Settings(
            params.model,
            params.adapter,
            params.train,
            params.seed,
            plan.longest(Documents(stage.DATA / "train"), params.train),
            here.world,
        ),
        plan.here(params.adapter),
    )
    # an adapter leaves the base as it is, so bf16 training can hold it in bf16; the adapter itself is float32
    dtype = torch.bfloat16 if params.train.precision == "bf16" else torch.float32
    model = models.load(params.model.base, dtype=dtype, **params.model.how())
    if manifest["vocabulary"]["size"] > model.config.vocab_size:
        raise InputError(
            f"data.tokenizer = {params.data.tokenizer} of {manifest['vocabulary']['size']} tokens",
            f"{params.model.base} has a vocabulary of {model.config.vocab_size}",
            "set the tokenizer of this model",
        )
    lessons, test = (
        rows(Documents(stage.DATA / side), params.train, seed, after_state=after_state, parts=of, world=here.world)
        for side, seed, of in (("train", params.seed, parts), ("valid", None, ()))
    )
    originals = checkpoint.read(params.model.base) if params.model.quantize != "none" else None
    adapted = attach(model, params.adapter, params.seed, originals=originals, start=start)
    del originals, start
    trained = [p for p in model.parameters() if p.requires_grad]
    print(
        f"training {sum(p.numel() for p in trained)} parameters beside {len(adapted)} matrices of "
        f"RWKV-{model.config.version}, {model.config.n_layer} layers of {model.config.n_embd}; "
        f"{f'{here.world} processes; ' if here.world > 1 else ''}run {digest}",
        flush=True,
    )
    if lessons.left_out.tokens:
        print(
            f"train.rows = {params.train.rows} with ctx_len = {params.train.ctx_len} cuts {lessons.left_out.documents} of "
            f"{len(lessons.documents)} documents off: {lessons.left_out.tokens} tokens are left out in every epoch",
            flush=True,
        )
    learn = partial(
        fit,
        model,
        groups(model, params.train.optimizer),
        lessons,
        test,
        params.train,
        seed=params.seed,
        folder=folder,
        here=here,
        made_from={
            "adapter": params.adapter.model_copy(update=dict.fromkeys(loaded)).model_dump(mode="json"),
            "base": str(params.model.base),
            "base_sha256": base_sha256,
            "load": params.model.how(),
            "dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
        },
        tokenizer=named(params.data.tokenizer, params.data.special_tokens) if params.train.samples else None,
    )
    if here.rank:
        learn(log=lambda step, metrics: None)
        return
    run = _record(params, digest, folder, base_sha256, asdict(model.config), manifest, data)
    about = AdapterRecord(
        format=1,
        # what files were called changes no byte
        adapter=params.adapter.model_copy(update=dict.fromkeys(loaded)),
        quantize=params.model.quantize,
        base_sha256=base_sha256,
        data_sha256=manifest["source"]["sha256"],
        vocabulary_sha256=manifest["vocabulary"]["sha256"],
        loaded=loaded["load"],
        run=digest,
    )

    def keep(path: Path, step: int | None = None) -> None:
        """Write what is learned so far, after `step` steps or after the last, as an adapter."""
        tensors = without_unchanged(trained_state(model), lambda: checkpoint.read(params.model.base), dtype)
        write(path, tensors, about if step is None else about.model_copy(update={"run": f"{digest}@{step}"}))

    with (
        tracking.Live(folder, params.tracking) as live,
        loggers.Also(folder, params.tracking),
        _incidents_noted(folder),
    ):
        result = learn(log=live.log, keep=keep, run=run)
        if result.best is None:
            keep(stage.ADAPTER)
        else:
            with whole_file(stage.ADAPTER) as temporary:
                shutil.copyfile(result.best, temporary)
        _write_saves(result)
        with whole_file(stage.TRAIN / TRAIN_LOG) as temporary:
            shutil.copyfile(folder / TRAIN_LOG, temporary)
        _write_table(stage.TRAIN / "history.csv", result.history["train"])
        _write_table(stage.TRAIN / "valid.csv", result.history["valid"])
        guards.write(stage.TRAIN / guards.INCIDENTS, result.incidents)
        with whole_file(stage.TRAIN / SAMPLES) as temporary:
            temporary.write_bytes((folder / SAMPLES).read_bytes() if params.train.samples else b"")
        with whole_file(stage.TRAIN / "metrics.json") as temporary:
            write_json(temporary, _metrics(result, lessons.left_out, predicted))
    record = RunRecord.read(folder)
    record = record.model_copy(update={"seconds_trained": record.seconds_trained + result.seconds})
    if result.halted:
        record.write(folder)  # it is continued, another time
    record.write(stage.TRAIN)
    tracking.publish(Path.cwd(), params.tracking)
    if not result.halted:
        _clear(folder)
    planned = f"{predicted.allocated / 1e6:.0f} MB" if predicted else "nothing"
    print(f"peak memory {result.peak_memory_mb:.0f} MB, planned {planned}")
    chosen = "" if result.best is None else f", the best of {result.steps}"
    print(
        f"held-out loss {result.history['valid'][result.step]['loss']:.4f} after {result.step} steps{chosen}; run {record.id}"
    )


def _clear(folder: Path) -> None:
    """Remove from a run's folder what only a run that goes on needs."""
    for file in (guards.INCIDENTS, SAMPLES):  # of this training; another in this folder has its own
        (folder / file).unlink(missing_ok=True)
    shutil.rmtree(folder / saves.FOLDER, ignore_errors=True)
    checkpoints.forget(folder)  # last of all: killed before this, the stage has nothing to learn again


@contextlib.contextmanager
def _incidents_noted(folder: Path) -> Iterator[None]:
    """However the run ends, its record says what was met on the way."""
    try:
        yield
    finally:
        # a full disk may be what the run is failing with: this must not hide it
        with contextlib.suppress(OSError, Problem):
            what = sorted({x.what for x in guards.read(folder / guards.INCIDENTS)})
            RunRecord.read(folder).model_copy(update={"incidents": what}).write(folder)


def _check_place(load: Path | None) -> None:
    """Raises InputError if DVC would not see that the file has changed."""
    if load is not None and not load.resolve().is_relative_to(START.resolve()):
        raise InputError(
            f"adapter.load = {load}",
            f"must be in {START}/, which is what dvc.yaml has as the dependency",
            f"copy it there: cp -r {load} {START}/",
        )


def token_files() -> dict[str, str]:
    """sha256 of the files in outputs/data that are learned and held out, masks too, by name: those of training come first."""
    files = [file for side in SIDES for file in sorted(stage.DATA.glob(f"{side}.*"))]
    return {file.name: sha256(file) for file in files}


def run_digest(
    params: Params,
    base_sha256: str,
    loaded: Mapping[str, str | None],
    data: Mapping[str, str],
    parts: Sequence[Part],
    world: int,
) -> str:
    """Name of a run: everything that its result depends on; not halt, checkpoint_every, attempts and memory, nor what
    files are called.
    """
    shaping = params.model_dump(mode="json", include={"seed", "adapter", "train"})
    shaping["adapter"] |= {name: digest for name, digest in loaded.items() if name in shaping["adapter"]}
    for name in ("halt", "checkpoint_every", "memory"):
        del shaping["train"][name]
    del shaping["train"]["guards"]["attempts"]
    text = json.dumps([shaping, params.model.how(), base_sha256, list(data.values()), parts, world], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(
    params: Params,
    digest: str,
    folder: Path,
    base_sha256: str,
    shape: dict[str, Any],
    manifest: dict[str, Any],
    data: dict[str, str],
) -> str:
    """Leave the record of the run that is continued in `folder`, or of a new one, whose metrics begin anew; its id."""
    if checkpoints.exist(folder) and (folder / FILE).exists():
        return RunRecord.read(folder).id
    known = checkpoints.run_id(folder)
    if known is None:
        (folder / mirror.LIVE).unlink(missing_ok=True)  # of another training in this folder
    record = RunRecord.fresh(
        Path.cwd(),
        digest=digest,
        started=time.time(),
        # how far it is to go for now is no fact of a run that may go on
        params=params.model_dump(mode="json", exclude={"train": {"halt"}}),
        base={"path": str(params.model.base), "sha256": base_sha256, **shape},
        data={name: manifest["source"][name] for name in ("path", "sha256", "rows")}
        | {side: manifest[side]["tokens"] for side in SIDES}
        | {"files": data},
    )
    if known is not None:  # its record was lost
        record = record.model_copy(update={"id": known})
    record.write(folder)
    return record.id


def _write_saves(result: Result) -> None:
    """The kept adapters, and a table that says of each when it was and how good. The table alone, if none was asked for."""
    rows = [["file", "step", "epoch", "valid_loss"]]
    with whole_folder(stage.TRAIN / saves.FOLDER) as temporary:
        for step, path in result.kept.items():
            try:
                (temporary / path.name).hardlink_to(path)
            except OSError:  # another disk, or one that can't
                shutil.copyfile(path, temporary / path.name)
            measured = result.history["valid"].get(step)
            epoch = step / result.steps * result.epochs
            loss = format(measured["loss"], ".9g") if measured else ""
            rows.append([path.name, str(step), format(epoch, ".9g"), loss])
        with (temporary / "saves.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _metrics(result: Result, left_out: LeftOut, predicted: plan.Plan | None) -> dict[str, float]:
    last, valid = result.history["train"][result.steps], result.history["valid"]
    return {
        "steps": result.steps,
        "result_step": result.step,
        "tokens": result.tokens,
        "documents_cut": left_out.documents,
        "tokens_left_out": left_out.tokens,
        "loss": last["loss"],
        "valid_loss": valid[result.step]["loss"],
        "valid_loss_before": valid[0]["loss"],
        "lr": last["lr"],
        "grad_norm": last["grad_norm"],
        "tokens_per_second": round(result.tokens_per_second, 1),
        "peak_memory_mb": round(result.peak_memory_mb, 1),
        **({"predicted_peak_mb": round(predicted.allocated / 1e6, 1)} if predicted else {}),
        "resumed_at": result.resumed_at,
        "incidents": len(result.incidents),
    }


def _write_table(path: Path, history: History) -> None:
    """One row a step, in order: the same run has the same bytes."""
    rows = sorted(history.items())
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *rows[0][1]])
        table.writerows(
            [step, *(x if isinstance(x, int) else format(x, ".9g") for x in row.values())] for step, row in rows
        )


if __name__ == "__main__":
    stage.launch("tasks.train")
    stage.main(train)
