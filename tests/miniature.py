"""A miniature repository: DVC stages that are real programs but take no time, and what its tests need beside it."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

DVC_YAML = """
stages:
  prepare:
    cmd: python -m tasks.prepare
    deps: [demo/outputs/corpus.txt, source.txt]
    outs: [outputs/data.txt]
  train:
    cmd: python -m tasks.train
    deps: [outputs/data.txt]
    outs: [outputs/model.txt]
    metrics:
      - outputs/metrics.json: {cache: false}
  evaluate:
    cmd: python -m tasks.evaluate
    deps: [outputs/model.txt]
    outs: [outputs/report.txt]
"""

DEMO_YAML = """
stages:
  corpus:
    cmd: python -m demo.corpus
    wdir: ..
    outs: [demo/outputs/corpus.txt]
  unused:
    cmd: python -m demo.corpus unused
    wdir: ..
    outs: [demo/outputs/unused.txt]
"""

COPY = """
from pathlib import Path
Path("outputs").mkdir(exist_ok=True)
print("{name}: reads {source}")
Path("{target}").write_text(Path("{source}").read_text() + "{name}\\n")
"""

# What it does is in a file that is no dependency: ok, fail, crash once, slow.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

behaviour = Path("behaviour").read_text()
Path("tries").open("a").write(behaviour + "\\n")
Path("stage_environment.json").write_text(json.dumps(dict(os.environ)))
Path("outputs").mkdir(exist_ok=True)

def save(signum, frame):
    time.sleep(0.5)
    Path("saved").write_text("weights")
    print("\\ntrain: saved at step 7 and stopped", flush=True)
    sys.exit(128 + signum)

if behaviour == "fail":
    print("train: data/x.jsonl: has no rows; add some", file=sys.stderr)
    sys.exit(1)
if behaviour == "crash once":
    Path("behaviour").write_text("ok")
    print("step 3 of 10", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "slow":
    signal.signal(signal.SIGTERM, save)
    for step in range(1200):
        print(f"\\rstep {step}", end="", flush=True)
        Path("running").touch()
        time.sleep(0.1)
    sys.exit("nobody stopped this")
Path("outputs/metrics.json").write_text(json.dumps({"loss": {"valid": 2.123456789}, "steps": 10}))
Path("outputs/model.txt").write_text(Path("outputs/data.txt").read_text() + "train\\n")
print("train: done")
"""


FILES = {
    "dvc.yaml": DVC_YAML,
    "demo/dvc.yaml": DEMO_YAML,
    "demo/corpus.py": 'from pathlib import Path\nPath("demo/outputs").mkdir(exist_ok=True)\n'
    'Path("demo/outputs/corpus.txt").write_text("corpus\\n")\nprint("corpus: 1 row")\n',
    "tasks/prepare.py": COPY.format(name="prepare", source="demo/outputs/corpus.txt", target="outputs/data.txt"),
    "tasks/train.py": TRAIN,
    "tasks/evaluate.py": COPY.format(name="evaluate", source="outputs/model.txt", target="outputs/report.txt"),
    # the stages here come before the real ones; what else flows/ takes from tasks/ is the real thing
    "tasks/__init__.py": "import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n",
    "demo/__init__.py": "",
    "source.txt": "1",
    # forms in Prefect show what is in it
    "params.yaml": (Path(__file__).parent.parent / "params.yaml").read_text(encoding="utf-8"),
    "behaviour": "ok",
    ".gitignore": "/outputs\n/demo/outputs\n/behaviour\n/.rwkvflow\n__pycache__\n",
}


def make(root: Path) -> None:
    """Write the repository into `root`, bring its first two stages up to date, and commit it."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    for command in (
        "git init -q",
        "dvc init -q",
        "dvc config core.analytics false",
        "dvc repro -q prepare",
        "git add -A",
        "git -c user.name=t -c user.email=t@t commit -qm start",
    ):
        subprocess.run(command.split(), cwd=root, check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def processes_in(root: Path) -> list[psutil.Process]:
    """Every process that works in the folder `root`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(root):
                found.append(process)
    return found


def dvc(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
