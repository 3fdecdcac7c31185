"""The record of one training: what was trained, from what, by which code, when. MLflow shows it; this file is it."""

import functools
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rwkv_core.errors import InputError
from rwkv_core.files import whole_file

FILE = "run.json"
"""Name of the record in a run folder, and in outputs/train."""

SWEEP, SWEEP_NAME = "RWKVFLOW_SWEEP", "RWKVFLOW_SWEEP_NAME"
"""Environment variables that tell a stage which sweep it is run for."""

Status = Literal["running", "finished", "failed", "killed"]

_PACKAGES = ("rwkv-flow", "torch", "pytorch-lightning", "triton", "deepspeed", "bitsandbytes", "numpy", "dvc", "mlflow")


class RunRecord(BaseModel):
    """One training, from its first step to its last, however often it was stopped and continued."""

    # A record may come from another version of this code: fields that this one does not know are passed over.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: str
    """Made when a training starts afresh and kept when it is continued; MLflow's tag `rwkvflow.run`."""

    digest: str
    """Of settings, data and base: it names the run folder."""

    started: float
    """Seconds since 1970."""

    finished: float | None = None
    """Seconds since 1970; None while it runs."""

    status: Status = "running"

    seconds_trained: float = Field(default=0.0, ge=0)
    """Time spent in training, all its continuations together."""

    incidents: list[str] = []
    """Kinds of what the guards met, sorted; the rest is in incidents.jsonl."""

    params: dict[str, Any]
    """params.yaml as it was."""

    base: dict[str, Any]
    """The checkpoint started from: path, sha256, version, n_layer, n_embd, ..."""

    data: dict[str, Any]
    """What was learned: path, sha256, rows; train and valid, the tokens of each side; files, the sha256 of each token file."""

    git: dict[str, Any]
    """commit, branch, dirty; each None outside a repository."""

    dvc_experiment: dict[str, str | None]
    """name and baseline of the DVC experiment; each None outside one."""

    sweep: dict[str, str | None] = {}
    """id and name of the sweep that it is an arm of; each None outside one."""

    prefect: dict[str, str | None]
    """flow_run and flow_run_name; each None outside a flow."""

    versions: dict[str, str]
    """Of Python and of the packages that decide the result."""

    host: str
    """The machine, in words."""

    @classmethod
    def fresh(
        cls,
        root: Path,
        *,
        digest: str,
        started: float,
        params: dict[str, Any],
        base: dict[str, Any],
        data: dict[str, Any],
    ) -> Self:
        """The record of a training that starts now, in the checkout `root`.

        Args:
            root: checkout whose commit is recorded.
            digest: of settings, data and base.
            started: seconds since 1970.
            params: params.yaml, nested.
            base: facts of the base checkpoint.
            data: facts of the data.
        """
        facts = circumstances(root)
        return cls(id=uuid4().hex, digest=digest, started=started, params=params, base=base, data=data, **facts)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in `folder`.

        Raises:
            InputError: what is there is no record.
            FileNotFoundError: there is none.
        """
        path = folder / FILE
        text = path.read_text(encoding="utf-8")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "its text"
            raise InputError(
                str(path), f"is not a run record: {where} is not valid", "remove the folder and train again"
            ) from None

    def write(self, folder: Path) -> None:
        """Put the record into `folder`, whole or not at all.

        Raises:
            WorldError: the folder can't be written to.
        """
        with whole_file(folder / FILE) as temporary:
            temporary.write_text(
                json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n", encoding="utf-8"
            )


def circumstances(root: Path) -> dict[str, Any]:
    """Who and where: git, dvc_experiment, sweep, prefect, versions and host, as fields of a `RunRecord`."""
    return {
        "git": _git_facts(root),
        "dvc_experiment": {"name": _variable("DVC_EXP_NAME"), "baseline": _variable("DVC_EXP_BASELINE_REV")},
        "sweep": {"id": _variable(SWEEP), "name": _variable(SWEEP_NAME)},
        "prefect": {"flow_run": _variable("RWKVFLOW_FLOW_RUN"), "flow_run_name": _variable("RWKVFLOW_FLOW_RUN_NAME")},
        "versions": _versions(),
        "host": _host(),
    }


def main_root(root: Path) -> Path:
    """The checkout that `root` was made from: itself, or the main one of a git worktree or of a DVC experiment's copy.

    What must outlive those copies lies there: .rwkvflow, mlflow.db.
    """
    root = root.resolve()
    for parent in root.parents:
        if parent.name == "exps" and parent.parts[-3:-1] == (".dvc", "tmp"):
            return main_root(parent.parents[2])
    git = root / ".git"
    if git.is_file():
        pointer = root / git.read_text(encoding="utf-8").partition("gitdir:")[2].strip()
        if pointer.parent.name == "worktrees":  # .git/worktrees/<name>; a submodule's pointer is no worktree
            return pointer.resolve().parents[2]
    return root


def _variable(name: str) -> str | None:
    return os.environ.get(name) or None


def _git_facts(root: Path) -> dict[str, Any]:
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "branch": None, "dirty": None}
    # dvc.lock is written by the very run that asks
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)dvc.lock")
    return {"commit": commit, "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changed)}


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _host() -> str:
    memory = psutil.virtual_memory().total / 2**30
    parts = [platform.node(), f"{platform.system()} {platform.machine()}", _processor(), f"{memory:.0f} GiB"]
    gpus = [_field(path, "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return ", ".join(part for part in (*parts, *gpus) if part)


def _processor() -> str:
    cores = f"{os.cpu_count()} cores"
    name = _field(Path("/proc/cpuinfo"), "model name") or platform.processor()
    return f"{name} ({cores})" if name else cores


def _field(path: Path, name: str) -> str:
    """The value of the first line `name : value` of a file; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
