"""All that is measured of a model, on the same texts as of another; and what changed, as files to read and to draw."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_core.data.binidx import Documents
from rwkv_core.data.whole import Source
from rwkv_core.evaluation import held_out
from rwkv_core.evaluation.held_out import Scores
from rwkv_core.evaluation.measure import Items, Measures, changes
from rwkv_core.evaluation.subject import Subject

Progress = Callable[[str, int, int], None]
"""Is told of what, how many documents are done, and how many there are."""


class Texts(NamedTuple):
    """What a model is judged on."""

    held_out: Documents
    sources: Sequence[Source]
    """Of the held-out documents."""
    general: Documents | None
    """Text that has nothing to do with the training."""


class Judged(NamedTuple):
    """What a model makes of the texts."""

    held_out: Scores
    general: Scores | None
    further: Measures
    """Measures beside the losses."""

    def measures(self, sources: Sequence[Source]) -> dict[str, Mapping[str, Items]]:
        """All measures by group and name."""
        found: dict[str, Mapping[str, Items]] = {"sources": held_out.by_source(self.held_out, sources)}
        if self.general is not None:
            found["general"] = {"loss": self.general.items()}
        return found | dict(self.further)


def judge(
    subject: Subject,
    texts: Texts,
    *,
    ctx_len: int,
    batch: int,
    skip_first: bool,
    progress: Progress = lambda what, done, total: None,
    further: Callable[[Subject], Measures] = lambda subject: {},
) -> Judged:
    """Score the texts with one model.

    Args:
        subject: the model.
        texts: to score.
        ctx_len: tokens that go through it at once.
        batch: documents side by side.
        skip_first: another of the models begins from a tuned state, and does not predict the first token of a document.
        progress: is told how far it is.
        further: measures it in other ways; not asked of a model whose losses are not numbers, which says nothing.
    """

    def score(what: str, documents: Documents) -> Scores:
        def told(done: int, total: int) -> None:
            progress(what, done, total)

        return subject.score(documents, ctx_len=ctx_len, batch=batch, skip_first=skip_first, progress=told)

    scores = score("documents", texts.held_out)
    general = None if texts.general is None else score("documents of general text", texts.general)
    return Judged(scores, general, further(subject) if np.isfinite(scores.nats).all() else {})


def compare(
    base: Judged, tuned: Judged, sources: Sequence[Source], *, resamples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Metrics: what `held_out.compare` says, and under "measures" what changed in each measure, by group and name."""
    found = held_out.compare(base.held_out, tuned.held_out, resamples=resamples, confidence=confidence, seed=seed)
    measures = (one.measures(sources) for one in (base, tuned))
    return {**found, "measures": changes(*measures, resamples=resamples, confidence=confidence, seed=seed)}


def write_documents(path: Path, base: Scores, tuned: Scores, sources: Sequence[Source]) -> None:
    """One row for each document that is scored."""
    scored = np.flatnonzero(base.tokens)
    one, other = (scores.of(base.tokens > 0) for scores in (base, tuned))
    names = [name for name, _, documents in sources for _ in range(documents)]
    columns = np.stack([one.tokens, one.bytes, one.nats / one.tokens, other.nats / other.tokens], 1)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["document", "tokens", "bytes", "base_loss", "tuned_loss", "source"])
        table.writerows(
            [i, *(format(x, ".9g") for x in row), names[i]]
            for i, row in zip(scored.tolist(), columns.tolist(), strict=True)
        )


def write_positions(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """The rows of `held_out.by_position`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["from", "to", "tokens", "base_loss", "tuned_loss", "change", "low", "high"])
        table.writerows([x if isinstance(x, int) else format(x, ".9g") for x in row.values()] for row in rows)
