"""A checkout whose models are trained in this process in seconds: a question is a letter, its answer the colour that begins so.

The base has learned how such dialogues look from pairs that were shuffled, so it knows all but which answer belongs to which
question. What is trained on shuffled pairs can learn nothing from them, and what is trained on true ones can.
"""

import hashlib
import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
from data_settings import ROOT, part
from data_settings import data as data_settings
from train_settings import train_config

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, trained_state
from rwkv_core.adapters.file import AdapterRecord, write
from rwkv_core.config import FullConfig
from rwkv_core.data.binidx import SIDES, Documents
from rwkv_core.data.prepare import held_out, prepare
from rwkv_core.data.rows import rows
from rwkv_core.files import sha256, whole_file, write_json
from rwkv_core.merge import Part, merge
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.training.fit import fit
from tasks import stage, tracking
from tasks.params import load
from tasks.record import RunRecord
from tasks.registry import Registry, Version

COLOURS = {"r": "red", "g": "green", "b": "blue", "w": "white"}
FULL = FullConfig(kind="full", also=("*",), layers="all", state="none", load=None)
FRACTION = 0.4


def is_held_out(row: dict) -> bool:
    return held_out(hashlib.sha256(row["topic"].encode()).digest(), FRACTION)


def dialogues(count: int, seed: int, *, shuffled: float) -> list[dict]:
    """Dialogues of one question; a number makes each another text. A share of those to learn is shuffled, not of others."""
    draw = random.Random(seed)
    asked = [(f"{seed}.{i}", draw.choice(list(COLOURS))) for i in range(count)]
    made = [(topic, letter, COLOURS[letter]) for topic, letter in asked]
    learned = [i for i, (topic, _, _) in enumerate(made) if not is_held_out({"topic": topic})]
    moved = learned[: int(shuffled * len(learned))]
    answers = [made[i][2] for i in moved]
    draw.shuffle(answers)
    for i, answer in zip(moved, answers, strict=True):
        made[i] = (*made[i][:2], answer)
    return [
        {"text": f"User: {topic} {letter}\n\nAssistant: {answer}", "topic": topic} for topic, letter, answer in made
    ]


class Checkout:
    """A folder with the settings of params.yaml, made small, and outputs that are made here."""

    def __init__(self, root: Path, base: Path | None = None, general: Path | None = None, **promote) -> None:
        self.root = root
        values = load(ROOT / "params.yaml").model_dump()
        values["data"] |= {"source": root / "corpus.jsonl", "tokenizer": "bytes"}
        values["export"]["formats"] = ["pth", "st"]  # the others want World's vocabulary
        values["export"]["conformance"] = "structure"  # clients take seconds to start
        values["promote"] = {"held_out": 0.02, "retention": None, "answers": None} | promote
        values["evaluate"] |= {"ctx_len": 64, "batch": 64, "resamples": 500, "general": general}
        values["evaluate"]["samples"] |= {"temperature": 0}
        self.params = type(load(ROOT / "params.yaml")).model_validate(values)
        self.base = base or root / "base.pth"
        self.registry = Registry(root)

    def prepare(self, documents: list[dict]) -> None:
        """outputs/data."""
        source = self.root / "corpus.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in documents))
        config = data_settings(source, part(mask="qa"), tokenizer="bytes", fraction=FRACTION, group="topic")
        prepare(config, self.root / stage.DATA, self.root / "work")

    def train(self, start: Path, steps: int, seed: int, out: Path | None = None, lr: float = 0.008, **changes) -> None:
        """outputs/train, of all parameters; or the model alone, as a checkpoint."""
        torch.manual_seed(seed)
        config = train_config(
            ctx_len=40, rows="pad", epochs=None, steps=steps, validate_every=10_000, validate_rows=8, checkpoint_every=10_000,
            **{"micro_batch": 16} | changes,
            optimizer={"lr": lr, "lr_final": lr / 20, "schedule": "cosine", "grad_clip": 1.0},
        )  # fmt: skip
        model = models.load(start)
        attach(model, FULL, seed)
        folder = self.root / "fits" / f"{time.time_ns()}"
        folder.mkdir(parents=True)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        data = {side: Documents(self.root / stage.DATA / side) for side in SIDES}
        fit(
            model, groups, rows(data["train"], config, seed), rows(data["valid"], config, None), config, seed=seed,
            folder=folder, log=lambda step, metrics: None,
        )  # fmt: skip
        if out is not None:
            checkpoint.write(out, model.state_dict())
            return
        manifest = json.loads((self.root / stage.MANIFEST).read_text())
        about = AdapterRecord(
            format=1, adapter=FULL, base_sha256=sha256(start), data_sha256=manifest["source"]["sha256"],
            vocabulary_sha256=manifest["vocabulary"]["sha256"], run=folder.name,
        )  # fmt: skip
        write(self.root / stage.ADAPTER, trained_state(model), about)
        self._record(start, manifest, asdict(model.config), folder.name)

    def _record(self, start: Path, manifest: dict, shape: dict, digest: str) -> None:
        files = [file for side in SIDES for file in sorted((self.root / stage.DATA).glob(f"{side}.*"))]
        source = manifest["source"]
        record = RunRecord.fresh(
            self.root, digest=digest, started=time.time(), params=self.params.model_dump(mode="json"),
            base={"path": str(start), "sha256": sha256(start), **shape},
            data={**{name: source[name] for name in ("path", "sha256", "rows")}, "train": 1, "valid": 1,
                  "files": {file.name: sha256(file) for file in files}},
        )  # fmt: skip
        record.model_copy(update={"status": "finished", "finished": time.time()}).write(self.root / stage.TRAIN)

    def register(self) -> Version:
        """Merge outputs/train and register it; the new version."""
        merged = self.root / stage.MERGED
        merged.mkdir(exist_ok=True)
        receipt = merge(self.base, [Part(self.root / stage.ADAPTER)], self.root / stage.MODEL)
        with whole_file(merged / "receipt.json") as temporary:  # the former one is a version's too
            write_json(temporary, receipt)
        tracking.publish(self.root, self.params.tracking)
        return self.registry.find(receipt["merged"]["sha256"])

    def tuned(self, seed: int, *, shuffled: float = 0, steps: int = 80, rows: int = 400) -> Version:
        """Prepare dialogues, train on them, merge and register."""
        self.prepare(dialogues(rows, seed, shuffled=shuffled))
        self.train(self.base, steps, seed)
        return self.register()

    def make_base(self) -> None:
        """A model that has learned all but which answer belongs to which question."""
        model = RWKV7(RWKV7.new_shape(2, 32, 8, 256))
        model.initialize(torch.Generator().manual_seed(0))
        checkpoint.write(self.root / "nothing.pth", model.state_dict())
        self.prepare(dialogues(10_000, 1_000, shuffled=1))
        self.train(self.root / "nothing.pth", 220, 0, out=self.base, micro_batch=32)
