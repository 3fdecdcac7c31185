"""evaluate: base and tuned model score the same held-out documents; a page says what came of it."""

import csv
import time
from pathlib import Path

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
from tasks.evidence import evidence
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
        sentence = report.write(out, evidence(Path.cwd(), out))
    tracking.publish(Path.cwd(), params.tracking)
    print(f"{sentence.en} The report is {stage.EVALUATE / 'report.html'}")


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


if __name__ == "__main__":
    stage.main(evaluate)
