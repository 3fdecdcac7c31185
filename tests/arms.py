"""A project whose training takes no time: for tests of what happens around it."""

from project import Project, make

TRAIN = '''
"""train, as far as anything outside can see: it takes a moment, and its loss follows from the settings."""

import json
import os
import signal
import time
from pathlib import Path

from tasks import stage
from tasks.params import load
from tasks.record import RunRecord, main_root


def train() -> None:
    params = load()
    main = main_root(Path.cwd())
    rank, lr = params.adapter.rank, params.train.optimizer.lr
    with (main / "ran").open("a") as file:
        file.write(f"{rank} {lr:g} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\\n")
    steps = params.train.halt or 100
    going = main / "going" / str(os.getpid())
    going.parent.mkdir(exist_ok=True)
    going.touch()
    with (main / "together").open("a") as file:
        file.write(f"{len(list(going.parent.iterdir()))}\\n")
    time.sleep(float((main / "takes").read_text()))
    going.unlink()
    if rank == 13:
        raise SystemExit("train: adapter.rank = 13: brings bad luck; take another")
    crashed = main / f"crashed {rank}"
    if rank == 11 and not crashed.exists():
        crashed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    stage.TRAIN.mkdir(parents=True, exist_ok=True)
    (stage.TRAIN / "saves").mkdir(exist_ok=True)
    for name in ("history.csv", "valid.csv", "train_log.txt", "incidents.jsonl", "samples.jsonl"):
        (stage.TRAIN / name).write_text("")
    stage.ADAPTER.write_bytes(bytes(rank))
    loss = 1 / rank + lr + 1 / steps
    (stage.TRAIN / "metrics.json").write_text(
        json.dumps({"valid_loss": loss, "peak_memory_mb": 10 * rank, "steps": steps, "tokens": 8 * steps})
    )
    record = RunRecord.fresh(Path.cwd(), digest="0" * 16, started=0, params={}, base={}, data={})
    record.model_copy(update={"seconds_trained": 1.0}).write(stage.TRAIN)


if __name__ == "__main__":
    stage.main(train)
'''


def quick(root, takes: float = 0) -> Project:
    """A project, with a training that takes so many seconds."""
    project = make(root, tracked=False)
    (root / "tasks/train.py").write_text(TRAIN)
    with (root / ".gitignore").open("a") as file:
        file.write("/ran\n/takes\n/going\n/together\n/crashed*\n")
    (root / "takes").write_text(str(takes))
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "quick")
    return project
