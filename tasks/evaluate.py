"""evaluate: base and tuned model score the same held-out documents; a page says what came of it."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rwkv_core import models, report
from rwkv_core.data.binidx import Documents
from rwkv_core.data.whole import whole
from rwkv_core.errors import InputError
from rwkv_core.evaluation import held_out
from rwkv_core.evaluation.judge import Judged, Texts, compare, judge, write_documents, write_positions
from rwkv_core.evaluation.subject import Subject
from rwkv_core.evaluation.suite import Suite
from rwkv_core.files import sha256, whole_folder, write_json
from rwkv_core.generation.sampling import Sampling
from rwkv_core.tokenizer import named
from tasks import stage, tracking
from tasks.evidence import evidence
from tasks.judging import precision, sources, store
from tasks.params import Params, load

TEXTS = Path("evaluation")
"""Where general text lies, and whatever else models are judged by. dvc.yaml can't name a file that may be none: the folder is
the dependency."""


def evaluate() -> None:
    """Base, outputs/merged and outputs/data -> outputs/evaluate: report.html and all that is in it."""
    params = load()
    settings, documents = params.evaluate, Documents(stage.DATA / "valid")
    _check_place("evaluate.general", settings.general)
    _check_place("evaluate.lm_eval.include", settings.lm_eval.include if settings.lm_eval else None)
    for name, path in settings.tasks.items():
        _check_place(f"evaluate.tasks.{name}", path)
    tokenizer = named(params.data.tokenizer, params.data.special_tokens)
    manifest = json.loads(stage.MANIFEST.read_text(encoding="utf-8"))
    prompts = [
        *settings.samples.prompts,
        *held_out.held_out_prompts(documents, tokenizer, settings.samples.held_out),
    ]
    state, known = stage.mounted(), store(Path.cwd())
    # merged, the base's config.json is lost
    divisor = models.divisor(params.model.base, params.model.head_size_divisor)
    suite = Suite(
        settings,
        tokenizer,
        documents,
        Documents(stage.DATA / "train") if settings.memorised is not None else None,
        marks=[part.marks[0] for part in params.data.parts if part.marks is not None],
        seed=params.seed,
        skip_first=state is not None,
        say=lambda text: print(text, flush=True),
    )
    judged, texts = dict[str, Judged](), dict[str, list[str]]()
    with tempfile.TemporaryDirectory(prefix="rwkvflow-") as folder:
        general = None
        if settings.general is not None:
            general, _ = whole(settings.general, tokenizer, Path(folder) / "general")
        on = Texts(documents, sources(manifest), general)
        for name, path in (("base", params.model.base), ("tuned", stage.MODEL)):  # one in memory at a time
            subject = Subject(
                path, tokenizer, state=state if name == "tuned" else None, dtype=precision(params), op=params.model.op,
                head_size_divisor=divisor, store=known,
            )  # fmt: skip
            judged[name] = judge(
                subject, on, ctx_len=settings.ctx_len, batch=settings.batch, skip_first=state is not None,
                progress=_Told(name), further=suite.ask,
            )  # fmt: skip
            texts[name] = _samples(subject, prompts, params)
    draws: dict[str, Any] = {"resamples": settings.resamples, "confidence": settings.confidence, "seed": params.seed}
    comparison = compare(judged["base"], judged["tuned"], on.sources, **draws)
    base, tuned = judged["base"].held_out, judged["tuned"].held_out
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
        write_documents(out / "documents.csv", base, tuned, on.sources)
        write_positions(out / "positions.csv", held_out.by_position(base, tuned, **draws))
        sentence = report.write(out, evidence(Path.cwd(), out))
    tracking.publish(Path.cwd(), params.tracking)
    print(f"{sentence.en} The report is {stage.EVALUATE / 'report.html'}")


def _check_place(setting: str, path: Path | None) -> None:
    """Raises InputError if DVC would not see that the file has changed."""
    if path is not None and not path.resolve().is_relative_to(TEXTS.resolve()):
        raise InputError(
            f"{setting} = {path}",
            f"must be in {TEXTS}/, which is what dvc.yaml has as the dependency",
            f"copy it there: cp -r {path} {TEXTS}/",
        )


class _Told:
    """A line now and then."""

    def __init__(self, name: str) -> None:
        self._name, self._shown = name, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._shown > 10:
            print(f"scoring the {self._name}: {done} of {total} {what}", flush=True)
            self._shown = time.monotonic()


def _samples(subject: Subject, prompts: list[str], params: Params) -> list[str]:
    settings = params.evaluate
    wanted = settings.samples
    sampling = Sampling(
        max_tokens=wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p, seed=params.seed
    )
    return [text for text, _ in subject.texts(prompts, sampling, ctx_len=settings.ctx_len, batch=settings.batch)]


if __name__ == "__main__":
    stage.main(evaluate)
