"""Evaluation's throughput, beside llama.cpp and the official `rwkv` package that read the same model and the same documents.

python -m benchmarks.evaluation [--threads N] [--rounds N] [--out FILE]

Ours is `evaluation.held_out.score`, as the stage calls it: cross-entropies of all tokens. llama.cpp reads each document as a
batch, once with the logits of all tokens, which an evaluation needs, and once with those of the last, as its own benchmark of
prompts does; the package's forward gives all. Each other program is a process of its own; all take turns. They need
`pip install 'rwkv-flow[gguf,llama]' rwkv`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.inference import CHANNELS, LAYERS, VOCABULARY, products, seconds, write_model
from benchmarks.machine import describe, parser, tell
from rwkv_core import models
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.evaluation.held_out import score
from rwkv_core.formats import gguf
from rwkv_core.tokenizer import named

DOCUMENTS, TOKENS = 4, 512

OFFICIAL = """
import sys, time, numpy, torch
file, threads = sys.argv[1], int(sys.argv[2])
from rwkv.model import RWKV
torch.set_num_threads(threads)
model = RWKV(model=file.removesuffix(".pth"), strategy="cpu fp32")
documents = numpy.load(sys.argv[3]).tolist()
print("ready", flush=True)
for line in sys.stdin:
    began, nats = time.perf_counter(), 0.0
    for document in documents:
        logits = model.forward([0, *document[:-1]], None, full_output=True)[0]
        nats += float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(document), reduction="sum"))
    print("took", time.perf_counter() - began, nats, flush=True)
"""

LLAMA = """
import sys, time, llama_cpp, numpy
file, threads = sys.argv[1], int(sys.argv[2])
documents = numpy.load(sys.argv[3])
length = documents.shape[1]
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, None)
model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
given = llama_cpp.llama_context_default_params()
given.n_ctx = given.n_batch = given.n_ubatch = length
given.n_threads = given.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, given)
batch = llama_cpp.llama_batch_init(length, 0, 1)
print("ready", flush=True)
for line in sys.stdin:
    every = line.strip() == "every"
    began, nats = time.perf_counter(), 0.0
    for document in documents:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = length
        for i, token in enumerate([0, *document[:-1].tolist()]):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, every or i == length - 1
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        if every:
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (length, %d)).astype(numpy.float64)
            top = logits.max(1, keepdims=True)
            each = top[:, 0] + numpy.log(numpy.exp(logits - top).sum(1)) - logits[numpy.arange(length), document]
            nats += each.sum()
        llama_cpp.llama_synchronize(context)
    print("took", time.perf_counter() - began, nats, flush=True)
"""


@contextmanager
def waiting(program: str, file: Path, documents: Path, threads: int) -> Iterator[Callable[[str], tuple[float, float]]]:
    """Another program with the model loaded. A call says what to do, and gets seconds and nats."""
    switches = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(file), str(threads), str(documents)],
        env=os.environ | switches, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def read(first: str) -> list[str]:
        for line in process.stdout or ():
            if line.startswith(first):
                return line.split()
        raise RuntimeError(f"{file.name}: its reader ended; its message is above")

    def ask(what: str) -> tuple[float, float]:
        if process.stdin is None:
            raise RuntimeError("the reader has no input")
        process.stdin.write(what + "\n")
        process.stdin.flush()
        _, took, nats = read("took")
        return float(took), float(nats)

    try:
        read("ready")
        yield ask
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, threads: int, rounds: int) -> str:
    path = folder / "model.pth"
    write_model(path)
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 65000, (DOCUMENTS, TOKENS))
    np.save(folder / "documents.npy", ids)
    writer = Writer(folder / "valid")
    for row in ids.tolist():
        writer.add(row)
    writer.close()
    documents, tokenizer, model = Documents(folder / "valid"), named("world", {}), models.load(path).eval()
    nats: dict[str, float] = {}

    def ours() -> None:
        found = score(model, documents, tokenizer, ctx_len=TOKENS, batch=DOCUMENTS)
        nats["ours"] = float(found.nats.sum())

    with ExitStack() as stack:
        others = {
            "rwkv package, float32": (
                stack.enter_context(waiting(OFFICIAL, path, folder / "documents.npy", threads)),
                "every",
            )
        }
        for dtype in ("F32", "F16"):
            file = folder / f"{dtype}.gguf"
            gguf.write(file, path, dtype)
            ask = stack.enter_context(waiting(LLAMA % VOCABULARY, file, folder / "documents.npy", threads))
            others[f"llama.cpp, {dtype}, logits of all"] = ask, "every"
            others[f"llama.cpp, {dtype}, logits of the last"] = ask, "last"
        took: dict[str, list[float]] = {"matrix products alone": [], "ours": [], **{name: [] for name in others}}
        floor = products(model)  # of 512 tokens
        for _ in range(rounds + 1):
            took["matrix products alone"].append(DOCUMENTS * TOKENS / 512 * seconds(floor))
            took["ours"].append(seconds(ours))
            for name, (ask, what) in others.items():
                duration, nats[name] = ask(what)
                took[name].append(duration)
    for name, found in nats.items():
        if found and not abs(found - nats["ours"]) < 2e-3 * nats["ours"]:
            raise RuntimeError(f"{name} finds {found} nats, ours {nats['ours']}")
    medians = {name: median(times[1:]) for name, times in took.items()}  # the first maps memory and starts threads
    lines = [
        f"{DOCUMENTS} documents of {TOKENS} tokens, L{LAYERS} C{CHANNELS} V{VOCABULARY}.", "",
        "| | tokens/s | ours / this |", "| --- | ---: | ---: |",
        *(f"| {name} | {DOCUMENTS * TOKENS / t:.0f} | {t / medians['ours']:.2f} |" for name, t in medians.items()),
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
