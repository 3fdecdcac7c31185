"""A small RWKV-7 base, trained from nothing by the project's own full training: a stand-in for a downloaded one."""

import hashlib
import json
import tempfile
from pathlib import Path

import torch

from demo.settings import FILE, OUTPUTS, DemoSettings
from rwkv_core import checkpoint
from rwkv_core.config import DataConfig, HoldoutConfig, PartConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.prepare import prepare
from rwkv_core.data.rows import rows
from rwkv_core.files import sha256
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.tokenizer import VOCAB_SIZE
from rwkv_core.training import checkpoints
from rwkv_core.training.fit import fit
from rwkv_core.training.optimizers import groups
from tasks import params, stage

_VALID = 0.02
"""Share of the documents that the held-out loss of the pretraining is measured on."""


def pretrain() -> None:
    """demo/outputs/pretrain.jsonl -> demo/outputs/base.pth, in bfloat16 as published checkpoints are."""
    settings = params.read(FILE, DemoSettings).pretrain
    source = OUTPUTS / "pretrain.jsonl"
    digest = hashlib.sha256(json.dumps([settings.model_dump(mode="json"), sha256(source)]).encode()).hexdigest()[:16]
    folder = Path(".rwkvflow/pretrain") / digest
    folder.mkdir(parents=True, exist_ok=True)
    model = RWKV7(RWKV7.new_shape(settings.n_layer, settings.n_embd, settings.head_size, VOCAB_SIZE))
    model.initialize(torch.Generator().manual_seed(settings.seed))
    optimizer = settings.train.optimizer
    with tempfile.TemporaryDirectory() as data:
        prepare(_plain(source), Path(data, "out"), Path(data, "work"))
        result = fit(
            model,
            groups(model, optimizer),
            rows(Documents(Path(data, "out/train")), settings.train, settings.seed),
            rows(Documents(Path(data, "out/valid")), settings.train, None),
            settings.train,
            seed=settings.seed,
            folder=folder,
            log=lambda step, metrics: None,
        )
    checkpoint.write(OUTPUTS / "base.pth", model.state_dict(), "bf16")
    checkpoints.forget(folder)
    print(f"pretrained on {result.tokens} tokens: held-out loss {result.history['valid'][result.steps]['loss']:.3f}")


def _plain(source: Path) -> DataConfig:
    """Every row is a text, all of which is learned."""
    every = PartConfig(
        name="all",
        files="*",
        kind="jsonl",
        columns={},
        blank_lines="keep",
        think="as_given",
        mask="none",
        marks=None,
        weight=1,
    )
    holdout = HoldoutConfig(fraction=_VALID, group=None, near_duplicates=None, leaks="keep")
    return DataConfig(
        source=source,
        tokenizer="world",
        special_tokens={},
        parts=(every,),
        refused=0,
        holdout=holdout,
        processes=1,
        cluster=None,
    )


if __name__ == "__main__":
    stage.main(pretrain)
