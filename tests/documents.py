"""Small sets of documents for the tests of what is made of them."""

import tempfile
from pathlib import Path

import numpy as np

from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents, Writer


class Weighed(Documents):
    """Documents with masks and weights of one's own."""

    masks = None
    weights = None

    def learned(self, i):
        return super().learned(i) if self.masks is None else self.masks[i]

    def weight(self, i):
        return 1.0 if self.weights is None else self.weights[i]


def documents(sizes, *, masks=None, weights=None):
    """No two tokens are the same, so that each says where it comes from."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder) / "x")
        first = 1
        for size in sizes:
            writer.add(range(first, first + size))
            first += size
        writer.close()
        made = Weighed(Path(folder) / "x")
    made.masks = None if masks is None else [np.array(mask, bool) for mask in masks]
    made.weights = weights
    return made


def config(rows, ctx_len, **changes):
    """Settings of train that rows are made by."""
    values = {
        "ctx_len": ctx_len, "rows": rows, "order": "as_given" if rows == "magic_prime" else "shuffled", "carry_state": False,
        "mix": {}, "micro_batch": 1, "accumulate": 1, "epochs": 1.0, "steps": None, "tokens": None, "precision": "fp32",
        "l2_wrap": 0.0, "validate_every": 1, "validate_rows": 1, "checkpoint_every": 1,
        "optimizer": {
            "lr": 0.01, "lr_final": 0.01, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "betas": (0.9, 0.99),
            "eps": 1e-8, "grad_clip": 0.0,
        },
    }  # fmt: skip
    return TrainConfig(**(values | changes))
