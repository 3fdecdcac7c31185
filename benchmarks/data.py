"""Rows of training data: how soon any of them is there, and how documents of unequal length are best run side by side.

python -m benchmarks.data [--documents N] [--threads N] [--rounds N] [--out FILE]
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, parser, pin, tell
from benchmarks.settings import train_config
from rwkv_core.config import TrainConfig
from rwkv_core.data import sampling
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.order import Part
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import MicroBatches
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.training.module import Training

MODES: dict[str, dict[str, Any]] = {
    "stream": {"rows": "stream"},
    "pad": {"rows": "pad"},
    "pad, similar_lengths": {"rows": "pad", "order": "similar_lengths"},
    "pack": {"rows": "pack"},
    "chunk": {"rows": "chunk"},
    "chunk, carry_state": {"rows": "chunk", "carry_state": True},
    "magic_prime": {"rows": "magic_prime", "order": "as_given"},
}
CTX_LEN, VOCAB = 512, 1024  # a small one: the head's part is the same in all
SPREADS = (1.0, 1.25, 1.5, 2.0, 4.0)


def config(micro_batch: int, **changes: Any) -> TrainConfig:
    """Settings that rows are made by."""
    return train_config(ctx_len=CTX_LEN, micro_batch=micro_batch, epochs=1.0, **changes)


def make(prefix: Path, count: int, vocab: int) -> Documents:
    """Documents of random tokens, 64 at the median; the log of their lengths is normal, as of chats."""
    draw = np.random.default_rng(0)
    writer = Writer(prefix)
    for size in draw.lognormal(np.log(64), 1, count).astype(int).clip(2, 4096):
        writer.add(draw.integers(1, vocab, size, dtype=np.uint16).tolist())
    writer.close()
    return Documents(prefix)


def access(documents: Documents) -> list[str]:
    """The table of random access."""
    part = [Part("all", 0, len(documents), documents.tokens, documents.tokens)]
    lines = [
        f"{len(documents)} documents, {documents.tokens} tokens, ctx_len {CTX_LEN}: rows at random places, medians.",
        "",
        "| rows | an epoch's plan, s | where a row is, us | and its tokens, us |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, mode in MODES.items():
        began = time.perf_counter()
        cut = rows(documents, config(8, **mode), 1, parts=part)
        total = cut.before(1)
        cut.row(0)
        opened = time.perf_counter() - began
        chosen = np.random.default_rng(1).integers(0, total, 5_000).tolist()
        times = []
        for number in chosen:
            began = time.perf_counter()
            row = cut.row(number)
            found = time.perf_counter()
            for reading in row:
                sampling.tokens_of(documents, reading)
            times.append((found - began, time.perf_counter() - began))
        where, read = 1e6 * np.median(times, axis=0)
        lines.append(f"| {name} | {opened:.2f} | {where:.1f} | {read:.1f} |")
    return lines


def spread(documents: Documents, rounds: int) -> list[str]:
    """How much longer the longest of a group may be than the shortest: what a step of packed rows takes."""
    model = RWKV7(RWKV7.new_shape(2, 128, 64, VOCAB))
    model.initialize(torch.Generator().manual_seed(0))
    settings = config(4, rows="pack")
    cut = rows(documents, settings, 1)
    training = Training(model, [], settings, 1, 0)
    lines = [
        "4 packed rows of 512 through 2 layers of 128 in fp32, forward and backward, beside a stream's; by how many times as "
        "long as the shortest document of a group the longest may be.",
        "",
        "| longest / shortest | groups | filled up | step, s | / stream |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]

    def batch_of(longer: float) -> Any:
        sampling.LONGER = longer
        return MicroBatches(cut, 4, 1, cut.before(1))[3]

    batches = {longer: batch_of(longer) for longer in SPREADS}
    stream = rows(documents, config(4, rows="stream"), 1)
    batches[0.0] = MicroBatches(stream, 4, 1, stream.before(1))[3]
    times: dict[float, list[float]] = {longer: [] for longer in batches}
    for _ in range(rounds):
        for longer, batch in batches.items():
            began = time.perf_counter()
            training.training_step(batch, 0).backward()
            times[longer].append((time.perf_counter() - began) / batch.tokens)
    plain = statistics.median(times[0.0])
    for longer in SPREADS:
        batch, each = batches[longer], statistics.median(times[longer])
        filled = sum(group.inputs.numel() for group in batch.groups) / batch.tokens - 1
        lines.append(
            f"| {longer:g} | {len(batch.groups)} | {100 * filled:.1f} % | {each * batch.tokens:.2f} | {each / plain:.2f} |"
        )
    return lines


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--documents", type=int, default=1_000_000)
    given = options.parse_args()
    pin(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        many = make(Path(folder, "many"), given.documents, 65530)
        tables = [access(many), spread(make(Path(folder, "few"), 5000, VOCAB), given.rounds)]
    tell("\n\n".join([describe(), *("\n".join(table) for table in tables)]) + "\n", given.out)


if __name__ == "__main__":
    main()
