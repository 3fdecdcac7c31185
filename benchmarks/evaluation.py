"""Evaluation's throughput, beside llama.cpp and the official `rwkv` package that read the same model and the same documents.

python -m benchmarks.evaluation [--threads N] [--rounds N] [--out FILE]

Ours is `evaluation.held_out.score`, as the stage calls it: cross-entropies of all tokens; and, for the prompts' sake, each
document read for the logits of its last token. llama.cpp reads each document as a batch, once with the logits of all tokens,
which an evaluation needs, and once with those of the last, as its own benchmark of prompts does; the package's forward gives
all. Each other program is a process of its own; all take turns. Documents are of equal length, which suits who reads them one
by one, and of lengths as of a chat set. They need `pip install 'rwkv-flow[gguf,llama,rwkv]'`.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.inference import CHANNELS, LAYERS, PROMPT, VOCABULARY, products, seconds, waiting, write_model
from benchmarks.machine import describe, parser, tell
from rwkv_core import checkpoint, models
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.evaluation.held_out import score
from rwkv_core.formats import gguf
from rwkv_core.generation.text import read
from rwkv_core.models.skeleton import RWKV
from rwkv_core.tokenizer import Tokenizer, named

EQUAL = [512] * 4
UNEQUAL = sorted(np.clip(np.random.default_rng(3).lognormal(5.0, 0.7, 32), 16, 512).astype(int).tolist())
"""Lengths of documents."""

OFFICIAL = """
import sys, time, json, torch
file, threads = sys.argv[1], int(sys.argv[2])
from rwkv.model import RWKV
torch.set_num_threads(threads)
model = RWKV(model=file.removesuffix(".pth"), strategy="cpu fp32")
print("ready", flush=True)
for line in sys.stdin:
    documents = json.load(open(line.split()[1]))
    began, nats = time.perf_counter(), 0.0
    for document in documents:
        logits = model.forward([0, *document[:-1]], None, full_output=True)[0]
        nats += float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(document), reduction="sum"))
    print("took", time.perf_counter() - began, nats, flush=True)
"""

LLAMA = """
import sys, time, json, llama_cpp, numpy
file, threads, most = sys.argv[1], int(sys.argv[2]), 512
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, None)
model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
given = llama_cpp.llama_context_default_params()
given.n_ctx = given.n_batch = given.n_ubatch = most
given.n_threads = given.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, given)
batch = llama_cpp.llama_batch_init(most, 0, 1)
print("ready", flush=True)
for line in sys.stdin:
    what, name = line.split()
    documents, every = json.load(open(name)), what == "every"
    began, nats = time.perf_counter(), 0.0
    for document in documents:
        length = len(document)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = length
        for i, token in enumerate([0, *document[:-1]]):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, every or i == length - 1
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        if every:
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (length, %d))
            top = logits.max(1)
            goals = logits[numpy.arange(length), document]
            nats += float((top + numpy.log(numpy.exp(logits - top[:, None]).sum(1)) - goals).sum())
        llama_cpp.llama_synchronize(context)
    print("took", time.perf_counter() - began, nats, flush=True)
"""


def measure(folder: Path, threads: int, rounds: int) -> str:
    path = folder / "model.pth"
    write_model(path)
    model = models.load(path).eval()
    tensors, tokenizer = checkpoint.read(path), named("world", {})
    with ExitStack() as stack:
        official = stack.enter_context(waiting(OFFICIAL, threads, path, threads))
        others = {"rwkv package, float32": (official, "every")}
        for form in ("f32", "f16"):
            file = folder / f"{form}.gguf"
            gguf.write(file, tensors, form, tokenizer.table)
            ask = stack.enter_context(waiting(LLAMA % VOCABULARY, threads, file, threads))
            others[f"llama.cpp, {form}, logits of all"] = ask, "every"
            others[f"llama.cpp, {form}, logits of the last"] = ask, "last"
        floor = products(model)
        return "\n\n".join(
            table(folder / name, lengths, model, tokenizer, others, floor, rounds)
            for name, lengths in (("equal", EQUAL), ("unequal", UNEQUAL))
        )


def table(
    prefix: Path,
    lengths: Sequence[int],
    model: RWKV,
    tokenizer: Tokenizer,
    others: Mapping[str, tuple[Callable[[str], list[float]], str]],
    floor: Callable[[], None],
    rounds: int,
) -> str:
    rng = np.random.default_rng(1)
    ids = [rng.integers(1, 65000, length).tolist() for length in lengths]
    file = prefix.with_suffix(".json")
    file.write_text(json.dumps(ids))
    writer = Writer(prefix)
    for row in ids:
        writer.add(row)
    writer.close()
    documents, nats = Documents(prefix), dict[str, float]()

    def ours() -> None:
        nats["ours"] = float(score(model, documents, tokenizer, ctx_len=512, batch=4).nats.sum())

    def last() -> None:
        for row in ids:
            read(model, [0, *row[:-1]], None, 512)

    mine = {"matrix products alone": floor, "ours": ours, "ours, logits of the last": last}
    took: dict[str, list[float]] = {name: [] for name in (*mine, *others)}
    for _ in range(rounds + 1):
        for name, call in mine.items():
            took[name].append(seconds(call) * (sum(lengths) / PROMPT if call is floor else 1))
        for name, (ask, what) in others.items():
            duration, nats[name] = ask(f"{what} {file}")
            took[name].append(duration)
    for name, found in nats.items():
        if found and not abs(found - nats["ours"]) < 2e-3 * nats["ours"]:
            raise RuntimeError(f"{name} finds {found} nats, ours {nats['ours']}")
    medians = {name: median(times[1:]) for name, times in took.items()}  # the first maps memory and starts threads
    lines = [
        f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all, "
        f"L{LAYERS} C{CHANNELS} V{VOCABULARY}.", "",
        "| | tokens/s | ours / this |", "| --- | ---: | ---: |",
        *(f"| {name} | {sum(lengths) / t:.0f} | {t / medians['ours']:.2f} |" for name, t in medians.items()),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.threads, given.rounds)
    tell(f"{describe()}; medians of {given.rounds}\n\n{found}\n", given.out)


if __name__ == "__main__":
    main()
