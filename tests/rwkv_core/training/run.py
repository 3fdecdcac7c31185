"""One training run in a process of its own, which can be told to meet with an accident. Started by test_resume.py.

Reads <folder>/base.pth and <folder>/data, keeps checkpoints and adapters in <folder>/run, leaves <folder>/adapter.pth and
history.json. `accident` is {"at": what, "count": how often it has happened, "signals": numbers to send oneself, "space": bytes
left}; and {"clock": seconds that it is wrong by}. `method` is an adapter's settings, or None for a LoRA with dropout.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, trained_state
from rwkv_core.config import LoraConfig, TrainConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.rows import rows
from rwkv_core.errors import InputError, Interrupted, WorldError
from rwkv_core.files import whole_file
from rwkv_core.training.fit import fit

folder, settings, accident, method = (globals()[name] for name in ("folder", "settings", "accident", "method"))

torch.set_num_threads(1)
seen = {"forward": 0, "validate": 0, "save": 0, "keep": 0, "end": 0}
true_time = time.time
time.time = lambda: true_time() + accident.get("clock", 0)


def limit(space: int) -> None:
    """Files end at this many bytes: what goes beyond meets EFBIG, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (space, resource.RLIM_INFINITY))


def happens(what: str) -> None:
    seen[what] += 1
    if accident.get("at") == what and seen[what] in accident["count"]:
        if "space" in accident:
            limit(accident["space"])
        for number in accident.get("signals", ()):
            os.kill(os.getpid(), number)


def save(trainer: pl.Trainer, path: Path, *args: object) -> None:
    """Lightning's, with time for an accident when half the file is written."""
    whole(trainer, path, *args)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    happens("save")
    path.write_bytes(data)


if accident.get("at") == "save":
    whole, pl.Trainer.save_checkpoint = pl.Trainer.save_checkpoint, save

config = TrainConfig(**settings)
model = models.load(folder / "base.pth")
lora = LoraConfig(
    kind="lora",
    rank=2,
    alpha=4,
    dropout=0.2,
    dora=False,
    rank_stabilized=False,
    targets=("att.receptance", "ffn.key"),
    layers="all",
    also=(),
    state="none",
    load=None,
)
attach(model, method or lora, seed=3)
model.ln_out.register_forward_hook(lambda *_: happens("forward" if model.training else "validate"))


def write(path: Path) -> None:
    """What is trained, with the same bytes under any name."""
    learned = trained_state(model)
    about = {name: (x.shape, x.dtype) for name, x in learned.items()}
    checkpoint.write_in_place(path, about, (x.detach() for x in learned.values()))


def keep(path: Path, step: int | None) -> None:
    """The adapter, with time for an accident when half of it is written."""
    with whole_file(path) as temporary:
        write(temporary)
        data = temporary.read_bytes()
        temporary.write_bytes(data[: len(data) // 2])
        happens("keep")
        temporary.write_bytes(data)


state = (method or lora).state != "none"
(folder / "run").mkdir(exist_ok=True)
try:
    result = fit(
        model,
        [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.01}],
        rows(Documents(folder / "data/train"), config, 5, after_state=state),
        rows(Documents(folder / "data/valid"), config, None, after_state=state),
        config,
        seed=11,
        folder=folder / "run",
        log=lambda step, metrics: None,
        keep=keep,
        run="its id",
    )
except (InputError, Interrupted, WorldError) as error:
    limit(resource.RLIM_INFINITY)
    (folder / "message").write_text(f"{type(error).__name__}: {error}")
    sys.exit(3)
happens("end")
write(folder / "adapter.pth")
kept = {path.name: path.read_bytes() for path in result.kept.values()}
assert kept.keys() <= {path.name for path in (folder / "run/saves").glob("*")}
torch.save([kept, result.step, result.best and result.best.read_bytes()], folder / "kept.pth")
(folder / "history.json").write_text(json.dumps([result.history, result.steps, result.tokens]))
(folder / "resumed_at").write_text(str(result.resumed_at))
