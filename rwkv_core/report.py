"""The evaluation as one page that needs no server and no network, and its pictures as files."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_core import page
from rwkv_core.files import whole_file

Array = npt.NDArray[np.float64]
Curve = Sequence[tuple[float, float]]

BASE, TUNED, LINE = "#8a8f98", "#2f7ed8", "#e0803c"
"""Colours that read on white and on black."""


def training_curve(train: Curve, valid: Curve) -> Any:
    """Loss by optimizer step: each step faintly, their running mean, and the held-out loss where it was measured."""
    figure, axes = _figure()
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color=TUNED, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=TUNED, linewidth=2, label="training (running mean)")
    if valid:
        axes.plot(*np.array(valid).T, color=LINE, marker="o", markersize=4, linewidth=1.5, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    return figure


def _smooth(values: Array) -> Array:
    """Exponential running mean over about a twentieth of the values, unbiased at the start."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    total = weight = 0.0
    out = np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight
    return out


def document_change(base: Array, tuned: Array) -> Any:
    """Each held-out document: its loss with the base against its loss with the tuned model. (D,) nats a token each."""
    figure, axes = _figure()
    low, high = min(base.min(), tuned.min()), max(base.max(), tuned.max())
    axes.plot([low, high], [low, high], color=BASE, linewidth=1, linestyle="--", label="no change")
    axes.scatter(base, tuned, s=12, color=TUNED, alpha=0.6, linewidths=0, label=f"{len(base)} documents")
    axes.set(xlabel="loss with the base", ylabel="loss with the tuned model", aspect="equal")
    axes.legend(frameon=False)
    return figure


def _figure() -> tuple[Any, Any]:
    # The object interface, not pyplot: nothing is global, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for part in ("top", "right"):
        axes.spines[part].set_visible(False)
    for part in ("left", "bottom"):
        axes.spines[part].set_color(BASE)
    axes.tick_params(colors=BASE)
    axes.xaxis.label.set_color(BASE)
    axes.yaxis.label.set_color(BASE)
    axes.grid(alpha=0.15, color=BASE)
    return figure, axes


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure as .png on white; the bytes depend on the figure alone."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "rwkv-flow", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for legend in (axes.get_legend() for axes in figure.axes):
            for label in legend.get_texts() if legend else ():
                label.set_color(BASE)
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return text.getvalue()[text.getvalue().index("<svg") :]


def write(
    path: Path,
    *,
    comparison: Mapping[str, Any],
    pictures: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    facts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the page.

    Args:
        path: the .html file.
        comparison: of `evaluate.compare`.
        pictures: figures by their caption.
        samples: {"prompt", "base", "tuned"} each.
        facts: tables by their title: data, model, settings.
    """
    page.write(
        path,
        "rwkv_core",
        "report.html.j2",
        c=comparison,
        verdict=verdict(comparison),
        pictures={c: _svg(f) for c, f in pictures.items()},
        samples=samples,
        facts=facts,
    )


def verdict(comparison: Mapping[str, Any]) -> str:
    """The result in a sentence."""
    change = comparison["change"]["loss"]
    word = {1: "better than", -1: "worse than", 0: "not distinguishable from"}[comparison["better"]]
    base, tuned = comparison["base"]["loss"], comparison["tuned"]["loss"]
    return (
        f"On {comparison['documents']} held-out documents the tuned model is {word} its base: the loss goes from "
        f"{base:.4f} to {tuned:.4f} nats a token, a change of {change['value']:+.4f} "
        f"({comparison['confidence']:.0%} interval {change['low']:+.4f} to {change['high']:+.4f})."
    )
