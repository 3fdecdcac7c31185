"""What came of a sweep: a table, and a chart of the held-out loss against what it takes."""

from collections.abc import Sequence
from pathlib import Path

from flows.arms import State, Sweep, Told
from rwkv_core.files import whole_file
from tasks import params, tracking

RESULTS = Path("sweeps")
"""Where the table and the chart of each sweep are, in a folder of its name: for people to keep, and to show."""

MEASURES = (("memory_mb", "peak memory, MB"), ("seconds", "training, s"), ("adapter_bytes", "adapter, bytes"))
"""Of an arm's result, beside its loss, and what they are called."""


def publish(root: Path, state: State, told: Sequence[Told]) -> tuple[Path, Path]:
    """Write what came of a sweep as a markdown table and as a chart, and tell MLflow.

    Returns:
        Both files.
    """
    folder = root.resolve() / RESULTS / state.sweep.name
    table, chart = folder / "table.md", folder / "pareto.png"
    with whole_file(table) as temporary:
        temporary.write_text(markdown(state.sweep, told), encoding="utf-8")
    with whole_file(chart) as temporary:
        draw(told, temporary)
    best = told[0].result
    numbers = {f"sweep/{name}": float(getattr(best, name)) for name in ("loss", "memory_mb", "seconds")} if best else {}
    numbers |= {"sweep/arms": float(len(told)), "sweep/failed": float(sum(t.failed is not None for t in told))}
    config = params.load(root / "params.yaml").tracking
    tracking.publish_sweep(
        root, config, state.id, state.sweep.name, numbers, [table, chart], markdown(state.sweep, told)
    )
    return table, chart


def markdown(space: Sweep, told: Sequence[Told]) -> str:
    """All arms, the best first; in bold what no other arm is better than in loss, memory, time and size alike."""
    names = list(dict.fromkeys(name for t in told for name in t.arm.chosen))
    header = ["experiment", *names, "held-out loss", "steps", *(title for _, title in MEASURES), ""]
    front = _front(told, [name for name, _ in MEASURES])
    lines = [header, ["---"] * len(header)]
    for t in told:
        name = f"**{t.arm.name}**" if t.arm.name in front else t.arm.name
        row = [name, *(_cell(t.arm.chosen.get(name)) for name in names)]
        if t.result is None:
            row += ["", "", *("" for _ in MEASURES)]
        else:
            row += [f"{t.result.loss:.4f}", f"{t.result.steps}", *(f"{getattr(t.result, m):.6g}" for m, _ in MEASURES)]
        lines.append([*row, _cell(f"failed: {t.failed}" if t.failed else "" if t.whole else "halted")])
    return f"# Sweep {space.name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _front(told: Sequence[Told], measures: Sequence[str]) -> set[str]:
    """Names of the arms that went furthest, and that no other of these is as good as in everything and better in something."""
    points = {
        t.arm.name: (t.result.loss, *(getattr(t.result, name) for name in measures))
        for t in told
        if t.result is not None and not t.failed and t.whole
    }
    return {
        name
        for name, point in points.items()
        if not any(o != point and all(a <= b for a, b in zip(o, point, strict=True)) for o in points.values())
    }


def draw(told: Sequence[Told], path: Path) -> None:
    """Held-out loss against memory, time and size, as a PNG: a line through what nothing is better than."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        known = [(t, t.result) for t in told if t.result is not None and not t.failed]
        for whole, style in ((True, {"color": "tab:blue"}), (False, {"color": "lightgray", "zorder": 1})):
            of = [result for t, result in known if t.whole is whole]
            label = "whole" if whole else "halted"
            axes.scatter([getattr(r, measure) for r in of], [r.loss for r in of], s=22, label=label, **style)
        front = _front(told, [measure])
        line = sorted((getattr(result, measure), result.loss) for t, result in known if t.arm.name in front)
        axes.plot(
            [x for x, _ in line], [y for _, y in line], color="tab:orange", linewidth=1, zorder=1, label="best of both"
        )
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss, nats a token")
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _cell(value: object) -> str:
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")
