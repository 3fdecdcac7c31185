"""Clients in a process of their own: one that crashes, hangs or fills the memory takes nothing with it.

    python -m rwkv_core.conformance.child REQUEST.json

A request is a list of jobs; each writes what it found into its folder: logits as .npy, and found.json.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rwkv_core.conformance import llama, rwkv_package, structure, transformers_library
from rwkv_core.conformance.contents import Array, Unreadable
from rwkv_core.conformance.read import read_state
from rwkv_core.processes import stop_with_parent

_SECONDS, _SECONDS_A_GIGABYTE = 300.0, 240.0
_WORDS = 300  # of what a crashed reader said last

Reader = Literal["rwkv", "llama", "transformers"]


@dataclass(frozen=True)
class Job:
    """A file to read, and what to compute."""

    reader: Reader
    path: str
    folder: str
    """Where the answer goes."""
    prompts: list[list[int]]
    version: str
    state: str | None = None
    texts: list[str] = field(default_factory=list)
    """These are encoded, where the file has a tokenizer that may be run; else none."""


@dataclass(frozen=True)
class Answer:
    """What a reader found."""

    reader: str
    """Its name and version."""
    trouble: str | None
    """Why there is nothing else."""
    logits: list[Array] = field(default_factory=list)
    """(T, V) for each prompt."""
    tokens: Mapping[str, Any] = field(default_factory=dict)
    """What the client says of the tokens."""


def run(jobs: Sequence[Job]) -> list[Answer]:
    """Do the jobs: those of one reader in one process, and those that it has not come to because it crashed, in one each."""
    groups: dict[tuple[str, bool], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.reader, job.reader == "rwkv" and job.version == "7"), []).append(job)
    troubles: dict[str, str] = {}
    for group in groups.values():
        trouble = _run(group)
        for job in group:
            if trouble and len(group) > 1 and not _found(job).is_file():
                troubles[job.folder] = _run([job])
            else:
                troubles[job.folder] = trouble
    return [_answer(job, troubles[job.folder]) for job in jobs]


def _found(job: Job) -> Path:
    return Path(job.folder) / "found.json"


def _run(jobs: Sequence[Job]) -> str:
    """Run a process for jobs of one reader; what went wrong with it as a whole, in words."""
    request = Path(jobs[0].folder) / "request.json"
    request.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    environment = dict(os.environ)
    if jobs[0].reader == "rwkv":
        environment |= rwkv_package.environment(jobs[0].version)
    size = sum(_size(Path(job.path)) for job in jobs) / 1e9
    limit = _SECONDS + _SECONDS_A_GIGABYTE * size
    command = [sys.executable, "-m", __name__, str(request)]
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"it had not ended after {limit:.0f} seconds"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode("utf-8", "replace").strip()[-_WORDS:]
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            return f"it was ended by {signal.Signals(-done.returncode).name}; it said: {said}"
    return f"it ended with {done.returncode}; it said: {said}"


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def _answer(job: Job, trouble: str) -> Answer:
    folder = Path(job.folder)
    try:
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Answer(job.reader, trouble or "it ended without a word")
    logits = [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(found.get("logits", 0))]
    return Answer(found["reader"], found.get("trouble"), logits, found.get("tokens", {}))


def main(request: Path) -> None:
    """Do the jobs of a request, one after the other."""
    stop_with_parent(signal.SIGKILL)
    for values in json.loads(request.read_text(encoding="utf-8")):
        job = Job(**values)
        found: dict[str, Any] = {"reader": job.reader}
        try:
            found |= _DO[job.reader](job)
        except Unreadable as problem:
            found["trouble"] = str(problem)
        except Exception as error:  # a client may fail in any way, and that is its verdict
            found["trouble"] = f"{type(error).__name__}: {error}"[:_WORDS]
        _found(job).write_text(json.dumps(found), encoding="utf-8")


def _rwkv(job: Job) -> dict[str, Any]:
    states = None
    if job.state is not None:
        states = {name: x.values() for name, x in read_state(Path(job.state)).tensors.items()}
    return {
        "reader": rwkv_package.name(),
        "logits": _keep(job, rwkv_package.logits(Path(job.path), job.prompts, states)),
    }


def _llama(job: Job) -> dict[str, Any]:
    seen = llama.logits(Path(job.path), job.prompts, job.texts)
    tokens = {"pieces": [piece.hex() for piece in seen.pieces], "encoded": seen.tokens, **seen.ends}
    return {"reader": llama.name(), "tokens": tokens, "logits": _keep(job, seen.logits)}


def _transformers(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {"reader": transformers_library.name()}
    if job.version == "4":
        found["logits"] = _keep(job, transformers_library.logits(Path(job.path), job.prompts))
    if job.texts:
        found["tokens"] = transformers_library.tokens(Path(job.path), job.texts, structure.DIALOGUE)
    return found


def _keep(job: Job, arrays: Sequence[Array]) -> int:
    for i, x in enumerate(arrays):
        np.save(Path(job.folder) / f"{i}.npy", x)
    return len(arrays)


_DO = {"rwkv": _rwkv, "llama": _llama, "transformers": _transformers}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
