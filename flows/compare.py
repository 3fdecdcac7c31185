"""`rwkvflow compare`: in what runs differ."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.environment import set_defaults
from flows.experiment import git
from rwkv_core.errors import InputError
from tasks import mirror, tracking
from tasks.mlflow_run import import_mlflow
from tasks.stage import DATA, OUTPUTS

WORKSPACE = "workspace"
"""What the working copy is called, as in `dvc exp show`."""

_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
_ABSENT = "-"
_METRICS = {"outputs/train/metrics.json": "final/", "outputs/evaluate/metrics.json": "evaluate/"}
"""What MLflow's metrics of a stage begin with."""


@dataclass
class Run:
    """What there is to say of one, by section and dotted name."""

    name: str
    kind: str
    """Where it was found: mlflow or dvc."""
    params: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    """Digests of what was read and made, by path."""
    code: dict[str, str] = field(default_factory=dict)
    """Digests of the code of each stage, and the commit."""
    metrics: dict[str, str] = field(default_factory=dict)


def compare(root: Path, names: Sequence[str]) -> str:
    """A table of all in which the runs differ; what is equal in all of them is left out.

    Args:
        root: the checkout.
        names: of DVC experiments, revisions of git, ids of MLflow's runs, or "workspace".

    Raises:
        InputError: fewer than two, or one is none of these.
    """
    set_defaults(root)
    if len(names) < 2:
        raise InputError(
            f"{len(names)} run", "a comparison is of two or more", "name another; workspace is what lies here"
        )
    if not (root / "dvc.yaml").is_file():
        raise InputError("dvc.yaml", "is not in this folder", "run this in the repository's root")
    runs = [_run(root, name) for name in names]
    known = {section: [r for r in runs if getattr(r, section)] for section in ("params", "data", "code", "metrics")}
    lines = []
    for section, those in known.items():
        rows = _differences([getattr(run, section) for run in those]) if len(those) > 1 else []
        if len({run.kind for run in those}) > 1:  # MLflow and DVC don't note all the same
            rows = [(name, values) for name, values in rows if _ABSENT not in values]
        if rows:
            wanted = [[values[those.index(run)] if run in those else "?" for run in runs] for _, values in rows]
            lines += _table([section, *names], [[name, *cells] for (name, _), cells in zip(rows, wanted, strict=True)])
            lines.append("")
    return "\n".join(lines) if lines else "No differences.\n"


def _differences(found: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for values in found for name in values)
    rows = [(name, [values.get(name, _ABSENT) for values in found]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _run(root: Path, name: str) -> Run:
    found = None if name == WORKSPACE or not _MLFLOW_ID.fullmatch(name) else _in_mlflow(root, name)
    return found or _in_dvc(root, name)


def _in_dvc(root: Path, name: str) -> Run:
    """Of the working copy, or of a revision: git's, or an experiment's name."""
    from dvc.repo import Repo
    from dvc.repo.experiments.exceptions import AmbiguousExpRefInfo
    from dvc.repo.experiments.utils import resolve_name

    with Repo(str(root)) as repo:
        if name == WORKSPACE:
            revision, commit = None, git(root, "rev-parse", "HEAD", check=False)
        else:
            try:
                experiment = resolve_name(repo.scm, name).get(name)
            except AmbiguousExpRefInfo:
                raise InputError(name, "experiments of several commits have this name", "give its revision") from None
            revision = git(root, "rev-parse", "--verify", "--quiet", f"{experiment or name}^{{commit}}", check=False)
            if revision is None:
                raise InputError(
                    name,
                    "is no experiment, revision or MLflow run",
                    "`dvc exp list --all-commits` names the experiments",
                )
            # an experiment is made from the commit before it
            commit = git(root, "rev-parse", f"{revision}^", check=False) if experiment else revision
        run = Run(name, "dvc")
        for held, values in repo.params.show(revs=[revision] if revision else None).items():
            if revision is None or held != "workspace":
                for path, of in values.get("data", {}).items():
                    prefix = "" if path == "params.yaml" else f"{path}:"
                    run.params |= {f"{prefix}{key}": _text(value) for key, value in mirror.flat(of["data"]).items()}
        for held, values in repo.metrics.show(revs=[revision] if revision else None).items():
            if revision is None or held != "workspace":
                for path, of in values.get("data", {}).items():
                    prefix = _METRICS.get(path, f"{path}:")
                    numbers = mirror.flat(of.get("data") or {})
                    run.metrics |= {f"{prefix}{key.replace('.', '/')}": _text(value) for key, value in numbers.items()}
    run.code["git commit"] = (commit or _ABSENT)[:10]
    if revision is None and git(
        root, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)dvc.lock", check=False
    ):
        run.code["git commit"] += ", changed"
    for path, lock in _locks(root, revision):
        for stage, entry in lock.get("stages", {}).items():
            label = stage if path == "dvc.lock" else f"{path.removesuffix('dvc.lock')}dvc.yaml:{stage}"
            for dep in entry.get("deps", []):
                digest = str(dep.get("md5") or dep.get("hash") or _ABSENT)[:10]
                if dep["path"].endswith(".py") or _is_code(root, dep["path"]):
                    run.code[f"{label}: {dep['path']}"] = digest
                elif Path(dep["path"]).is_relative_to(DATA) or not Path(dep["path"]).is_relative_to(OUTPUTS):
                    run.data[dep["path"]] = digest  # models that were made here tell nothing that the rest does not
    return run


def _locks(root: Path, revision: str | None) -> list[tuple[str, dict[str, Any]]]:
    from ruamel.yaml import YAML

    yaml, found = YAML(typ="safe"), []
    for path in ("dvc.lock", "demo/dvc.lock"):
        if revision is None:
            text = (root / path).read_text(encoding="utf-8") if (root / path).exists() else None
        else:
            text = git(root, "show", f"{revision}:{path}", check=False)
        if text:
            found.append((path, yaml.load(text)))
    return found


def _is_code(root: Path, path: str) -> bool:
    """A folder of the repository that git has code of."""
    return bool(git(root, "ls-files", "--", f"{path}/*.py", check=False))


def _in_mlflow(root: Path, name: str) -> Run | None:
    """A run there, by its id or by ours; None if it knows none."""
    import_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking.uri(root))
    try:
        found = client.get_run(name)
    except MlflowException:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.`{mirror.RUN_TAG}` = '{name}'", max_results=1)
        if not runs:
            return None
        found = runs[0]
    tags = found.data.tags
    inputs = found.inputs.dataset_inputs if found.inputs else []
    data = {
        f"{entry.dataset.name} ({entry.tags[0].value})": entry.dataset.digest[:10] for entry in inputs if entry.tags
    }
    changed = ", changed" if tags.get("git.dirty") == "True" else ""
    return Run(
        name,
        "mlflow",
        params=dict(found.data.params),
        data=data,
        code={"git commit": tags.get("git.commit", _ABSENT)[:10] + changed},
        metrics={
            key: _text(value)
            for key, value in found.data.metrics.items()
            if key.startswith(("final/", "evaluate/"))  # the others are curves
        },
    )


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
