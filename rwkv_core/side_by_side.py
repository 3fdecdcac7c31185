"""Any model on any text, beside another: what the evaluate stage does for its outputs, for files wherever they lie."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from rwkv_core import checkpoint, report
from rwkv_core.data.binidx import Documents
from rwkv_core.data.whole import Source, whole
from rwkv_core.errors import InputError
from rwkv_core.evaluation.held_out import Scores, by_position
from rwkv_core.evaluation.judge import Texts, compare, judge, write_documents, write_positions
from rwkv_core.evaluation.subject import Subject
from rwkv_core.files import whole_folder, write_json
from rwkv_core.texts import TEXTS as T
from rwkv_core.texts import Text
from rwkv_core.tokenizer import Tokenizer


def vocabulary(path: Path) -> int:
    """Tokens that the model in a checkpoint knows.

    Raises:
        InputError: it can't be read, or is no model.
    """
    embedding = checkpoint.read(path).get("emb.weight")
    if embedding is None:
        raise InputError(str(path), "has no emb.weight, so it is no RWKV", "give a model's file")
    return len(embedding)


def read(data: Path, tokenizer: Tokenizer, folder: Path) -> tuple[Documents, list[Source]]:
    """Text to judge models on, and where it comes from.

    Args:
        data: whatever `data.source` may be, of which every row is scored whole; or a binidx with the masks that a preparation
            made, by its path without an ending, such as outputs/data/valid.
        tokenizer: of the models.
        folder: to write token files into, where there are none.

    Raises:
        InputError: it can't be read.
    """
    if not data.with_name(f"{data.name}.idx").exists():
        return whole(data, tokenizer, folder / "text")
    documents, manifest = Documents(data), data.with_name("manifest.json")
    facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    parts = [
        Source(part["name"], part["first"], part["documents"]) for part in facts.get(data.name, {}).get("parts", ())
    ]
    if sum(part.documents for part in parts) != len(documents):  # the manifest is another's
        parts = [Source(data.name, 0, len(documents))]
    return documents, parts


def evaluate(
    base: Subject,
    tuned: Subject,
    data: Path,
    *,
    ctx_len: int,
    batch: int,
    resamples: int,
    confidence: float,
    seed: int,
    out: Path | None = None,
    page: bool = False,
    progress: Callable[[str, str, int, int], None] = lambda name, what, done, total: None,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Score a text with two models.

    Args:
        base: what is compared with.
        tuned: what is judged.
        data: see `read`.
        ctx_len: tokens that go through a model at once.
        batch: documents side by side.
        resamples: of the bootstrap.
        confidence: of its intervals.
        seed: of its draws.
        out: a folder for metrics.json, documents.csv, positions.csv and receipt.json; replaced whole. None: none is written.
        page: write the report there, too, as the evaluate stage does: of what is known here.
        progress: is told whose documents are scored, of what, how many are done, and how many there are.

    Returns:
        The metrics, as `judge.compare` gives them, and the rows of `held_out.by_position`.

    Raises:
        InputError: a file can't be read or used, there is nothing to score, or the models have different vocabularies.
    """
    sizes = [vocabulary(subject.path) for subject in (base, tuned)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{base.path} and {tuned.path}",
            f"have vocabularies of {sizes[0]} and {sizes[1]} tokens, and nats a token are not the same thing then",
            "compare with a model of the same tokenizer",
        )
    with tempfile.TemporaryDirectory(prefix="rwkvflow-") as folder:
        documents, sources = read(data, tuned.tokenizer, Path(folder))
        about = {"path": str(data), "sha256": documents.digest()}
        judged = {}
        for name, subject in (("base", base), ("tuned", tuned)):  # one in memory at a time
            judged[name] = judge(
                subject, Texts(documents, sources, None), ctx_len=ctx_len, batch=batch,
                skip_first=base.has_state or tuned.has_state, progress=partial(progress, name),
            )  # fmt: skip
            subject.release()
    draws: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    metrics = compare(judged["base"], judged["tuned"], sources, **draws)
    before, after = judged["base"].held_out, judged["tuned"].held_out
    rows = by_position(before, after, **draws)
    if out is not None:
        with whole_folder(out) as made:
            write_json(made / "metrics.json", metrics)
            write_json(made / "receipt.json", {"base": dict(base.about), "tuned": dict(tuned.about), "data": about})
            write_documents(made / "documents.csv", before, after, sources)
            write_positions(made / "positions.csv", rows)
            if page:
                report.write(made, _evidence(base, tuned, about, metrics, rows, (before, after)))
    return metrics, rows


def _evidence(
    base: Subject,
    tuned: Subject,
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    positions: Sequence[Mapping[str, float]],
    scores: tuple[Scores, Scores],
) -> report.Evidence:
    """What a report of two models can show: no training, for it may be anyone's, and no answers."""
    scored = [one.of(scores[0].tokens > 0) for one in scores]
    count = {name: f"{metrics[name]:,}" for name in ("documents", "tokens")}
    models: list[tuple[Text, object]] = [(T["base"], PurePath(base.path)), (T["tuned"], PurePath(tuned.path))]
    if tuned.about["quantize"] != "none":
        models.append((T["frozen"], tuned.about["quantize"]))
    hashes = {
        "base_hash": base.about["model"], "adapter_hash": tuned.about["adapter"], "state_hash": tuned.about["state"],
        "tuned_hash": tuned.about["model"] if tuned.about["model"] != base.about["model"] else None,
        "data_hash": data["sha256"],
    }  # fmt: skip
    return report.Evidence(
        comparison=metrics, train=[], valid=[], positions=positions, samples=[],
        documents=(scored[0].nats / scored[0].tokens, scored[1].nats / scored[1].tokens),
        facts=[
            (T["data"], [(T["source"], PurePath(data["path"])), (T["held_out_of"], T["documents_tokens"](**count))]),
            (T["model"], models),
        ],
        lineage=[(T[name], digest) for name, digest in hashes.items() if digest],
    )  # fmt: skip
