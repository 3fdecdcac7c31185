"""A private copy of this repository with inputs so small that the whole pipeline takes seconds."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from ruamel.yaml import YAML

from rwkv_core import checkpoint
from rwkv_core.models.rwkv7 import RWKV7

ROOT = Path(__file__).parent.parent
WORDS = "the state of a model is what it carries from token to token and it learns to keep what matters"

NOWHERE = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
"""An MLflow that answers nobody: a stage that finds none takes half of the time."""


@dataclass
class Project:
    """A checkout in `root`, and the environment that its commands run in."""

    root: Path
    environment: dict[str, str]

    def run(self, *command, check=True, **variables):
        """Run a command in the checkout and return what it printed, both streams in one."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check:
            assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
        return done

    def stage(self, name, check=True, **variables):
        return self.run(sys.executable, "-m", f"tasks.{name}", check=check, **variables)

    def dvc(self, *arguments, check=True, **variables):
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check, **variables)

    def set(self, **values):
        """Set values of params.yaml by dotted name, dots written as two underscores."""
        yaml, file = YAML(), self.root / "params.yaml"
        params = yaml.load(file.read_text())
        for dotted, value in values.items():
            *sections, name = dotted.split("__")
            section = params
            for part in sections:
                section = section[part]
            section[name] = value
        with file.open("w") as out:
            yaml.dump(params, out)

    def json(self, path):
        return json.loads((self.root / path).read_text())


def make(root: Path, *, tracked: bool = True) -> Project:
    """Copy what git knows, new files included, and give it a tiny base and corpus of its own.

    Args:
        root: where it shall lie.
        tracked: whether runs go to the MLflow of the checkout, or to none.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.endswith("dvc.lock"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DVC_", "RWKVFLOW_"))}
    project = Project(
        root,
        kept
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
        }
        | ({} if tracked else NOWHERE),
    )  # fmt: skip
    write_base(root / "mine" / "base.pth")
    write_corpus(root / "mine" / "corpus.jsonl")
    (root / "mine" / ".gitignore").write_text("*\n")
    project.set(
        data__source="mine/corpus.jsonl",
        data__holdout__fraction=0.3,
        model__base="mine/base.pth",
        adapter__rank=2,
        train__ctx_len=32,
        train__micro_batch=4,
        train__epochs=1,
        train__validate_every=5,
        train__validate_rows=8,
        train__checkpoint_every=2,
        train__optimizer__lr=0.01,
        train__optimizer__lr_final=0.001,
        train__optimizer__warmup_steps=2,
        evaluate__ctx_len=64,
        evaluate__resamples=200,
        export__formats=["pth", "st"],  # llama.cpp has no heads as small as these
        export__conformance="structure",  # clients take seconds to start
    )
    samples = {"prompts": [], "held_out": 1, "max_tokens": 4, "temperature": 0, "top_p": 1}
    answers, memorised = {"count": 12, "max_tokens": 4}, {"count": 20, "prompt": 8, "continuation": 2}
    project.set(evaluate__samples=samples, evaluate__answers=answers, evaluate__memorised=memorised)
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "as cloned")
    return project


def copy_of(project, root: Path, *, tracked: bool = False):
    """Another project whose outputs are those that this one has, for a test to damage."""
    copy = make(root, tracked=tracked)
    shutil.copytree(project.root / "outputs", copy.root / "outputs")
    return copy


def files(project) -> dict[str, bytes]:
    """All outputs, by their path."""
    return {
        str(p.relative_to(project.root)): p.read_bytes() for p in (project.root / "outputs").rglob("*") if p.is_file()
    }


def write_base(path: Path, seed: int = 0, n_embd: int = 32) -> None:
    """A random RWKV-7 of two layers, trained on nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = RWKV7(RWKV7.new_shape(2, n_embd, 8, 65536))
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("output.weight", "ffn.value.weight")):  # they begin at zero: let the blocks take part
                p.normal_(0, 0.05, generator=generator)
    checkpoint.write(path, model.state_dict(), "bf16")


def write_corpus(path: Path, rows: int = 60, seed: int = 0) -> None:
    """Rows of User / Assistant turns in twenty topics."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            answer = " ".join(draw.choices(WORDS.split(), k=draw.randint(5, 40)))
            file.write(
                json.dumps({"text": f"User: What is {i}?\n\nAssistant: {answer}.", "topic": f"topic {i % 20}"}) + "\n"
            )
