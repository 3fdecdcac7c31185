"""`rwkvflow evaluate`: any model on any text, beside another."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import options
from rwkv_core.errors import InputError


def evaluate(
    model: Annotated[Path, typer.Argument(help="Any RWKV-4 to 7: a file or a folder.")],
    data: Annotated[
        Path,
        typer.Argument(help="Text: whatever data.source may be. Or token files with their masks: outputs/data/valid."),
    ],
    adapter: options.Beside = None,
    state: options.State = None,
    quantize: options.Packed = None,
    against: Annotated[
        Path | None, typer.Option(help="What to compare with; if none, the model without all of the above.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for metrics.json, documents.csv, positions.csv, receipt.json.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html and report.md into --out, too, as the pipeline does.")
    ] = False,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    ctx_len: Annotated[
        int, typer.Option(min=1, help="Tokens of each document that go through the model at once.")
    ] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Documents side by side.")] = 8,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 2000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Coverage of the intervals.")] = 0.95,
    head_size_divisor: options.Divisor = None,
) -> None:
    """Score a text with a model, as it is used, and with another: loss, perplexity, bits per byte, by source and position.

    What was scored before, on this machine with the same files and settings, is not scored again; a killed one goes on.
    """
    if (
        out is not None
        and out.exists()
        and not (out / "metrics.json").is_file()
        and (out.is_file() or any(out.iterdir()))
    ):
        raise InputError(str(out), "something else is there", "name another folder, or remove it")
    if report and out is None:
        raise InputError("--report", "is written into a folder", "name one: --out FOLDER")
    from rwkv_core import side_by_side
    from rwkv_core.evaluation.subject import Subject
    from rwkv_core.tokenizer import for_vocabulary
    from tasks.judging import store

    words = for_vocabulary(side_by_side.vocabulary(model), tokenizer)
    how: dict[str, Any] = {"dtype": dtype, "head_size_divisor": head_size_divisor, "store": store(Path.cwd())}
    tuned = Subject(model, words, adapter=adapter, state=state, quantize=quantize, **how)
    base = Subject(against or model, words, **how)
    if report and base.about == tuned.about:
        raise InputError(
            "--report", "is of two models, and this is one", "give --against, or what the model is used with"
        )
    shown = time.monotonic()

    def progress(name: str, what: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            typer.echo(f"scoring the {name}: {done} of {total} {what}", err=True)
            shown = time.monotonic()

    metrics, positions = side_by_side.evaluate(
        base, tuned, data, ctx_len=ctx_len, batch=batch, resamples=resamples, confidence=confidence, seed=0, out=out,
        page=report, progress=progress,
    )  # fmt: skip
    for line in table(metrics, positions, same=base.about == tuned.about):
        typer.echo(line)
    if out is not None:
        typer.echo(f"written to {out}")


_NAMES = {"loss": "loss, nats a token", "perplexity": "perplexity", "bits_per_byte": "bits a byte"}


def table(metrics: Mapping[str, Any], positions: Sequence[Mapping[str, float]], *, same: bool) -> Iterator[str]:
    """The metrics in lines.

    Args:
        metrics: of `judge.compare`.
        positions: of `held_out.by_position`.
        same: both models are one, so there is nothing to compare.
    """
    rows = [(_NAMES[name], metrics["base"][name], metrics["tuned"][name], metrics["change"][name]) for name in _NAMES]
    for group, measures in metrics["measures"].items():
        rows += [(f"loss, {name}", one["base"], one["tuned"], one["change"]) for name, one in measures.items()]
        if group == "sources" and len(measures) == 1:  # it is all there is
            rows.pop()
    rows += [
        (f"loss, tokens {row['from']} to {row['to']}", row["base_loss"], row["tuned_loss"], _interval(row))
        for row in positions
    ]
    width = max(len(name) for name, *_ in rows)
    yield f"{metrics['documents']} documents, {metrics['tokens']} tokens" + (
        f"; {metrics['documents_not_scored']} documents have none to score" if metrics["documents_not_scored"] else ""
    )
    if not same:
        yield f"{'':{width}}  {'base':>9}  {'tuned':>9}  {'change':>9}  {metrics['confidence']:.0%} interval"
    for name, base, tuned, change in rows:
        if same:
            yield f"{name:{width}}  {tuned:9.4f}"
        else:
            interval = f"{change['low']:+.4f} to {change['high']:+.4f}"
            yield f"{name:{width}}  {base:9.4f}  {tuned:9.4f}  {change['value']:+9.4f}  {interval}"
    if not same:
        words = {1: "lower", -1: "higher", 0: "not distinguishable"}
        yield f"The loss is {words[metrics['better']]}{' than' if metrics['better'] else ' from'} the base's."


def _interval(row: Mapping[str, float]) -> dict[str, float]:
    return {"value": row["change"], "low": row["low"], "high": row["high"]}
