"""Some runs, shared by as many processes as torchrun has started. Started by test_parallel.py: ranks.py FOLDER.

Reads FOLDER/base.pth, FOLDER/data and FOLDER/runs.json; each run leaves <name>.pth and <name>.json. A run may have another
`base`, and may `stop` at a step, as if signalled, and be started again. With DS_ACCELERATOR=cpu, DeepSpeed runs without a
card.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from methods import EXAMPLES

from rwkv_core import models
from rwkv_core.adapters import attach, trained_state
from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.rows import rows
from rwkv_core.errors import Interrupted
from rwkv_core.files import sha256
from rwkv_core.training.fit import fit
from rwkv_core.training.parallel import Ranks

folder = Path(sys.argv[1])
here = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
torch.set_num_threads(1)

if os.environ.get("DS_ACCELERATOR") == "cpu":
    import without_card

    without_card.allow()


def run(name, settings, method, stop, base="base.pth"):
    config = TrainConfig(**settings)
    model = models.load(folder / base)
    adapter = EXAMPLES[method]
    made_from = {
        "adapter": adapter.model_dump(mode="json"), "base": base, "base_sha256": sha256(folder / base),
        "load": {"head_size_divisor": None, "op": "auto", "quantize": "none"}, "dtype": "fp32",
    }  # fmt: skip
    attach(model, adapter, seed=3)
    after_state = adapter.state != "none"
    data = [
        rows(Documents(folder / "data" / side), config, seed, after_state=after_state, world=here.world)
        for side, seed in (("train", 5), ("valid", None))
    ]
    (folder / f"run {name}").mkdir(exist_ok=True)

    def log(step, metrics):
        if step == stop and here.rank == here.world - 1 and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)  # to one of the ranks

    groups = model.parameter_groups(config.optimizer.lr, config.optimizer.weight_decay)
    try:
        result = fit(
            model,
            groups,
            *data,
            config,
            seed=11,
            folder=folder / f"run {name}",
            log=log,
            here=here,
            made_from=made_from,
        )
    except Interrupted:
        return False
    if here.rank == 0:
        torch.save(trained_state(model), folder / f"{name}.pth")
        (folder / f"{name}.json").write_text(
            json.dumps([result.history, result.steps, result.tokens, result.resumed_at])
        )
    return True


for one in json.loads((folder / "runs.json").read_text()):
    if not run(**one):
        run(**one | {"stop": None})
