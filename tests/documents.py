"""Small sets of documents for the tests of what is made of them."""

import tempfile
from pathlib import Path

import numpy as np
from train_settings import train_config

from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.evaluation.held_out import Scores


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
    order = "as_given" if rows == "magic_prime" else "shuffled"
    return train_config(**{"ctx_len": ctx_len, "rows": rows, "order": order} | changes)


def scores_of(nats, tokens, size):
    """What a model makes of documents of one range of positions: for each its nats, tokens and bytes."""
    nats, tokens, size = (np.array(column, float) for column in (nats, tokens, size))
    return Scores(nats, tokens, size, nats[:, None], tokens[:, None])
