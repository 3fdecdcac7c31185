"""evaluate: base and tuned model score the same held-out documents; a page says what came of it."""

import csv
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_core import checkpoint, models, report
from rwkv_core.data.binidx import Documents
from rwkv_core.evaluation import held_out as evaluation
from rwkv_core.evaluation.held_out import Scores
from rwkv_core.files import sha256, whole_folder, write_json
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import generate
from rwkv_core.models.state import mount
from rwkv_core.tokenizer import Tokenizer, named
from tasks import stage, tracking
from tasks.params import Params, load


def evaluate() -> None:
    """Base, outputs/merged and outputs/data -> outputs/evaluate: report.html and all that is in it."""
    params = load()
    settings, documents = params.evaluate, Documents(stage.DATA / "valid")
    tokenizer = named(params.data.tokenizer, params.data.special_tokens)
    prompts = [
        *settings.samples.prompts,
        *evaluation.held_out_prompts(documents, tokenizer, settings.samples.held_out),
    ]
    scores, texts = {}, {}
    state = stage.mounted()
    for name, path in (("base", params.model.base), ("tuned", stage.MODEL)):  # one in memory at a time
        scores[name], texts[name] = _judge(name, path, state, documents, tokenizer, prompts, params)
    comparison = evaluation.compare(
        scores["base"],
        scores["tuned"],
        resamples=settings.resamples,
        confidence=settings.confidence,
        seed=params.seed,
    )
    samples = [
        {"prompt": prompt, "base": base, "tuned": tuned}
        for prompt, base, tuned in zip(prompts, texts["base"], texts["tuned"], strict=True)
    ]
    with whole_folder(stage.EVALUATE) as out:
        write_json(out / "metrics.json", comparison)
        write_json(out / "samples.json", samples)
        receipt = {"base": {"sha256": sha256(params.model.base)}, "tuned": {"sha256": sha256(stage.MODEL)}}
        if state is not None:
            receipt["tuned"]["state_sha256"] = sha256(state)
        write_json(out / "receipt.json", receipt)
        _write_documents(out / "documents.csv", scores["base"], scores["tuned"])
        pictures = _pictures(scores["base"], scores["tuned"])
        for (_, figure), file in zip(pictures.items(), ("loss_curve.png", "documents.png"), strict=True):
            report.save_picture(figure, out / file)
        report.write(
            out / "report.html",
            comparison=comparison,
            pictures=pictures,
            samples=samples,
            facts=_facts(params, receipt),
        )
    tracking.publish(Path.cwd(), params.tracking)
    print(f"{report.verdict(comparison)} The report is {stage.EVALUATE / 'report.html'}")


def _judge(
    name: str,
    path: Path,
    state: Path | None,
    documents: Documents,
    tokenizer: Tokenizer,
    prompts: list[str],
    params: Params,
) -> tuple[Scores, list[str]]:
    """Scores and samples of the base or of the tuned model, on which the state is mounted, if there is one."""
    import torch

    settings, device = params.evaluate, "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if params.train.precision == "bf16" else torch.float32
    divisor = models.divisor(
        params.model.base, params.model.head_size_divisor
    )  # merged, the base's config.json is lost
    model = models.load(path, dtype=dtype, device=device, op=params.model.op, head_size_divisor=divisor).eval()
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > 10:
            print(f"scoring the {name}: {done} of {total} documents", flush=True)
            shown = time.monotonic()

    tuned = checkpoint.read(state) if state is not None and name == "tuned" else None
    scores = evaluation.score(
        model,
        documents,
        tokenizer,
        ctx_len=settings.ctx_len,
        batch=settings.batch,
        state=tuned,
        skip_first=state is not None,
        progress=progress,
    )
    begin = None if tuned is None else mount(model.initial_state(1), tuned)
    wanted = settings.samples
    sampling = Sampling(
        max_tokens=wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p, seed=params.seed
    )
    texts = [
        continuation.text
        for continuation in generate(
            model,
            tokenizer,
            prompts,
            sampling,
            ctx_len=settings.ctx_len,
            batch=settings.batch,
            states=[begin] * len(prompts),
        )
    ]
    return scores, texts


def _pictures(base: Scores, tuned: Scores) -> dict[str, Any]:
    scored = base.tokens > 0
    train, valid = (_read_curve(stage.TRAIN / name) for name in ("history.csv", "valid.csv"))
    return {
        "Loss during training.": report.training_curve(train, valid),
        "Every held-out document, in nats a token; below the line is better.": report.document_change(
            *(one.nats[scored] / one.tokens[scored] for one in (base, tuned))
        ),
    }


def _read_curve(path: Path) -> list[tuple[float, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def _write_documents(path: Path, base: Scores, tuned: Scores) -> None:
    """One row for each document that is scored."""
    scored = np.flatnonzero(base.tokens)
    (nats, tokens, size), after = (Scores(*(column[scored] for column in one)) for one in (base, tuned))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["document", "tokens", "bytes", "base_loss", "tuned_loss"])
        columns = np.stack([tokens, size, nats / tokens, after.nats / tokens], 1)
        table.writerows(
            [i, *(format(x, ".9g") for x in row)] for i, row in zip(scored.tolist(), columns.tolist(), strict=True)
        )


def _words(settings: Mapping[str, Any]) -> Iterator[str]:
    """Numbers with their names, and switches that are on."""
    for name, value in settings.items():
        word = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from _words(value)
        elif value is True:
            yield word
        elif value is not False:
            yield f"{word} {value:g}" if isinstance(value, int | float) else f"{word} {value}"


def _facts(params: Params, receipt: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    manifest = json.loads(stage.MANIFEST.read_text(encoding="utf-8"))
    adapter, train = params.adapter, params.train
    settings = adapter.model_dump(exclude={"kind", "targets", "also", "layers", "state", "load", "load_init"})
    trained = [*getattr(adapter, "targets", ()), *adapter.also]
    trained += [f"the initial state ({adapter.state})"] if adapter.state != "none" else []
    tuned = receipt["tuned"]
    mounted = {"mounted state sha256": tuned["state_sha256"][:16]} if "state_sha256" in tuned else {}
    return {
        "Data": {
            "source": manifest["source"]["path"],
            "rows": manifest["source"]["rows"],
            "training": f"{manifest['train']['documents']} documents, {manifest['train']['tokens']} tokens",
            "held out": f"{manifest['valid']['documents']} documents, {manifest['valid']['tokens']} tokens",
            "split by": manifest["holdout"]["group"] or "text",
        },
        "Model": {
            "base": params.model.base,
            "base sha256": receipt["base"]["sha256"][:16],
            "tuned sha256": tuned["sha256"][:16],
            **mounted,
        },
        "Training": {
            "method": ", ".join([adapter.kind, *_words(settings)]),
            "trained": f"{', '.join(trained)}; layers: {adapter.layers}",
            "frozen matrices kept in": "full" if params.model.quantize == "none" else params.model.quantize,
            "begun from": adapter.load or "the method's own values",
            "length": next(
                f"{value:g} {name}"
                for name in ("epochs", "steps", "tokens")
                if (value := getattr(train, name)) is not None
            ),
            "rows": ", ".join((train.rows, *(["state carried"] if train.carry_state else []), train.order)),
            "tokens a step": train.ctx_len * train.micro_batch * train.accumulate,
            "learning rate": f"{train.optimizer.lr:g} to {train.optimizer.lr_final:g}, {train.optimizer.schedule}",
            "seed": params.seed,
        },
    }


if __name__ == "__main__":
    stage.main(evaluate)
