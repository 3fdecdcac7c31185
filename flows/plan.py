"""`rwkvflow plan`: what a run will take, as a table or as JSON."""

import importlib
import json
import math
import re
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from rwkv_core import plan
from rwkv_core.data.binidx import Documents
from rwkv_core.data.order import Part
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import Extent, extent
from rwkv_core.errors import InputError
from rwkv_core.training import parallel
from tasks import params, stage, tracking


def size(text: str) -> int:
    """Bytes of "24GB", "24G" or "24000MB": a card's GB are 2^30.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])i?B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InputError(f"--gpu-memory {text}", "must be a size", "write it as 24GB")
    return int(float(found[1]) * (1 << (30 if found[2].upper() == "G" else 20)))


def show(gpu_memory: str | None, shape: str | None, *, as_json: bool, solve: bool, speed: bool) -> None:
    """Print the plan of params.yaml, and with `solve` that of the nearest settings that fit.

    Raises:
        InputError: a setting, the checkpoint or an option can't be used; or, with `solve`, nothing fits.
    """
    given = params.load()
    importlib.import_module("tasks.train")  # as training would: what that takes is in this process's memory
    tracking.load_libraries()
    room = plan.here(given.adapter, size(gpu_memory) if gpu_memory else None)
    base = plan.base_named(shape) if shape else plan.base_in(given.model.base, given.model.head_size_divisor)
    settings, reads = plan.Settings(given.model, given.adapter, given.train, given.seed), None
    shared = given.train.parallel
    settings = replace(settings, world=parallel.devices(shared) * shared.nodes)
    if (stage.DATA / "train.idx").exists():
        documents = Documents(stage.DATA / "train")
        settings = replace(settings, row=plan.longest(documents, given.train))
        reads = _extent(given, documents)
    found = plan.predict(base, settings, room)
    nearest = None
    if solve or not found.fits:
        nearest = plan.solve(base, settings, room)
    rate = plan.tokens_per_second(base, settings, room) if speed else None
    report = _report(base, settings, found, nearest, reads, rate)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, Console(highlight=False))
    if solve and nearest is None:
        raise InputError(
            f"a peak of {plan.gigabytes(found.peak)}",
            f"no settings of the same steps fit into {plan.gigabytes(room.bytes)}",
            "take a smaller model or a shorter ctx_len",
        )


def _extent(given: params.Params, documents: Documents) -> Extent:
    manifest = json.loads(stage.MANIFEST.read_text(encoding="utf-8")) if stage.MANIFEST.exists() else {}
    parts = [Part(*(part[field] for field in Part._fields)) for part in manifest.get("train", {}).get("parts", ())]
    lessons = rows(documents, given.train, given.seed, after_state=given.adapter.state != "none", parts=parts)
    return extent(lessons, given.train)


def _report(
    base: plan.Base, settings: plan.Settings, found: plan.Plan, nearest: tuple[plan.Settings, plan.Plan] | None,
    reads: Extent | None, rate: float | None,
) -> dict[str, Any]:  # fmt: skip
    s = base.shape
    return {
        "model": f"RWKV-{s.version}, {s.n_layer} layers of {s.n_embd}, {found.parameters} parameters: {base.name}",
        "trained": found.trained,
        "device": found.room.kind,
        "processes": settings.world,
        "terms": found.terms,
        "peak": found.peak,
        "room": found.room.bytes,
        "fits": found.fits,
        "steps": reads.steps if reads else None,
        "tokens": reads.tokens if reads else None,
        "tokens_per_second": rate,
        "seconds": reads.tokens / rate if reads and rate else None,
        "disk": found.disk,
        "nearest": None
        if nearest is None
        else {"set": plan.changes(settings, nearest[0]), "terms": nearest[1].terms, "peak": nearest[1].peak},
    }


def _print(report: dict[str, Any], console: Console) -> None:
    console.print(report["model"])
    if report["processes"] > 1:
        console.print(f"one of {report['processes']} processes")
    table = Table()
    table.add_column("memory at the peak")
    table.add_column("", justify="right")
    table.add_column("%", justify="right")
    for name, taken in sorted(report["terms"].items(), key=lambda term: -term[1]):
        table.add_row(name, plan.gigabytes(taken), f"{100 * taken / report['peak']:.0f}")
    table.add_section()
    table.add_row("in all", plan.gigabytes(report["peak"]), "100")
    what = "GPU memory" if report["device"] == "cuda" else "memory of this machine"
    table.add_row(what, plan.gigabytes(report["room"]), f"{100 * report['room'] / report['peak']:.0f}")
    console.print(table)
    lines = Table.grid(padding=(0, 2))
    lines.add_row("fits", "yes" if report["fits"] else "no")
    if report["nearest"] is not None:
        lines.add_row(
            "nearest that fits",
            f"{plan.written(report['nearest']['set'])} ({plan.gigabytes(report['nearest']['peak'])})",
        )
    elif not report["fits"]:
        lines.add_row("nearest that fits", "none of the same steps: take a smaller model or a shorter ctx_len")
    lines.add_row("trained", f"{report['trained']} parameters")
    if report["tokens"] is None:
        lines.add_row("tokens", "unknown: the data is not prepared (rwkvflow run prepare)")
    else:
        lines.add_row("tokens", f"{report['tokens']} in {report['steps']} steps")
    if report["tokens_per_second"]:
        lines.add_row(
            "speed", f"about {report['tokens_per_second']:.0f} tokens a second, as timed here on a few layers"
        )
    else:
        lines.add_row("speed", "not timed" + ("" if report["device"] == "cpu" else ": this machine has no such card"))
    if report["seconds"]:
        lines.add_row("time", _duration(report["seconds"]))
    lines.add_row("disk", ", ".join(f"{name} {plan.gigabytes(taken)}" for name, taken in report["disk"].items()))
    console.print(lines)


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
