"""RWKV-7 inference against its two floors: the matrix products of a prompt, and the memory that a token must read.

python -m benchmarks.inference [--threads N] [--rounds N] [--out FILE]

The official `rwkv` package runs the same checkpoint and tokens, in a process of its own, for it sets switches of torch for
the whole process. All take turns, so that other load on the machine meets all alike.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.machine import describe, parser, tell
from kernels import build
from kernels.products import linear, product
from rwkv_core import checkpoint, models
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State

LAYERS, CHANNELS, HEAD_SIZE, VOCABULARY = 12, 768, 64, 65536
PROMPT = 512
TOKENS = 8  # generated in each round

OFFICIAL = """
import sys, time, torch
stem, threads, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
from rwkv.model import RWKV
torch.set_num_threads(threads)
model = RWKV(model=stem, strategy="cpu fp32")
ids = torch.load(stem + ".ids").tolist()
state = model.forward(ids[:4], None)[1]
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    if line.strip() == "prompt":
        logits = model.forward(ids, None, full_output=True)[0]
        torch.save(logits[-1], stem + ".logits")
    else:
        for _ in range(tokens):
            logits, state = model.forward([7], state)
    print("took", time.perf_counter() - began, flush=True)
"""


def write_model(path: Path) -> None:
    """A checkpoint of random values: what a model computes does not change how long it takes."""
    with torch.device("meta"):
        shapes = RWKV7(RWKV7.new_shape(LAYERS, CHANNELS, HEAD_SIZE, VOCABULARY)).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, like in shapes.items():
        x = torch.randn(like.shape, generator=generator)
        if like.squeeze().ndim == 2:
            tensors[name] = x * like.shape[-1] ** -0.5
        else:
            tensors[name] = 0.1 * x + ("ln" in name)
    checkpoint.write(path, tensors)


@contextmanager
def waiting(program: str, threads: int, *words: object) -> Iterator[Callable[[str], list[float]]]:
    """Another program, which waits in a process of its own with its model loaded. A call says what to do, and gets its numbers.

    Args:
        program: says "ready", and for each line that it reads "took" with the seconds and what else it found.
        threads: that it may use.
        words: what it is started with.
    """
    switches = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        env=os.environ | switches, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def read(first: str) -> list[float]:
        for line in process.stdout or ():
            if line.startswith(first):
                return [float(word) for word in line.split()[1:]]
        raise RuntimeError(f"the program started with {words} ended; its message is above")

    def ask(what: str) -> list[float]:
        if process.stdin is None:
            raise RuntimeError("the program has no input")
        process.stdin.write(what + "\n")
        process.stdin.flush()
        return read("took")

    try:
        read("ready")
        yield ask
    finally:
        process.terminate()
        process.wait()


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def products(model: RWKV) -> Callable[[], None]:
    """All matrix products of a prompt, and nothing else."""
    x = torch.randn(PROMPT, CHANNELS)
    inputs = {CHANNELS: x, 4 * CHANNELS: torch.randn(PROMPT, 4 * CHANNELS)}
    matrices: list[Tensor] = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    pairs = [(p, model.get_parameter(name[:-1] + "2")) for name, p in model.named_parameters() if name[-2:] in PAIRS]

    def run() -> None:
        for weight in matrices:
            linear(inputs[weight.shape[1]], weight)
        for down, up in pairs:
            product(product(x, down), up)

    return run


PAIRS = ("w1", "a1", "v1", "g1")


def token_bytes(model: RWKV) -> int:
    """Bytes that a token must move: every parameter once, but one row of the embedding, and the state both ways."""
    parameters = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "emb.weight")
    state = sum(x.numel() * x.element_size() for block in model.initial_state(1) for x in block)
    return parameters + CHANNELS * model.emb.weight.element_size() + 2 * state


def generate(model: RWKV, state: State) -> Callable[[], None]:
    token = torch.tensor([[7]])

    def run() -> None:
        nonlocal state
        for _ in range(TOKENS):
            _, state = model(token, state)

    return run


def measure(folder: Path, threads: int, rounds: int) -> str:
    path = folder / "model.pth"
    write_model(path)
    ids = torch.randint(1, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(1))
    torch.save(ids, folder / "model.ids")
    wide, narrow = models.load(path), models.load(path, dtype=torch.bfloat16)
    large, total = torch.randn(1 << 26), torch.empty(1)
    read = build.function("linear", "rwkv_sum", "4q")
    results: dict[str, Tensor] = {}

    def prompt(model: RWKV, name: str) -> Callable[[], None]:
        def run() -> None:
            results[name] = model(ids[None])[0][0, -1]

        return run

    states = {name: model(ids[None, :4])[1] for name, model in (("wide", wide), ("narrow", narrow))}
    ours = {
        "products": products(wide),
        "prompt": prompt(wide, "ours"),
        "prompt bf16": prompt(narrow, "bf16"),
        "read": lambda: read(large.data_ptr(), large.numel(), total.data_ptr(), threads),
        "token": generate(wide, states["wide"]),
        "token bf16": generate(narrow, states["narrow"]),
    }
    took: dict[str, list[float]] = {name: [] for name in (*ours, "official prompt", "official token")}
    with waiting(OFFICIAL, threads, folder / "model", threads, PROMPT, TOKENS) as official:
        for _ in range(rounds + 1):
            for name, call in ours.items():
                took[name].append(seconds(call))
            for what in ("prompt", "token"):
                took[f"official {what}"].append(official(what)[0])
    theirs = torch.load(folder / "model.logits")
    torch.testing.assert_close(results["ours"], theirs, rtol=1e-3, atol=1e-3)
    medians = {name: median(times[1:]) for name, times in took.items()}  # the first maps memory and starts threads
    return table(medians, wide, narrow, 4 * large.numel())


def table(t: dict[str, float], wide: RWKV, narrow: RWKV, large: int) -> str:
    bandwidth = large / t["read"]
    lines = [
        f"A prompt of {PROMPT} tokens, L{LAYERS} C{CHANNELS} V{VOCABULARY}, logits of all positions.",
        "",
        "| | milliseconds | tokens/s | / its matrix products |",
        "| --- | ---: | ---: | ---: |",
    ]
    for title, name in (
        ("matrix products alone, float32", "products"), ("ours, float32", "prompt"), ("ours, bfloat16", "prompt bf16"),
        ("rwkv package, float32", "official prompt"),
    ):  # fmt: skip
        lines.append(f"| {title} | {t[name] * 1e3:.0f} | {PROMPT / t[name]:.0f} | {t[name] / t['products']:.2f} |")
    lines += [
        "",
        f"One token at a time. Memory reads at {bandwidth / 1e9:.1f} GB/s (a sum over {large >> 20} MiB).",
        "",
        "| | milliseconds | tokens/s | MB a token | share of the bandwidth |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for title, name, model in (
        ("ours, float32", "token", wide), ("ours, bfloat16", "token bf16", narrow),
        ("rwkv package, float32", "official token", wide),
    ):  # fmt: skip
        each, size = t[name] / TOKENS, token_bytes(model)
        share = size / each / bandwidth
        lines.append(f"| {title} | {each * 1e3:.1f} | {1 / each:.1f} | {size / 1e6:.0f} | {share:.2f} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.threads, given.rounds)
    text = f"{describe()}; medians of {given.rounds}\n\n{found}\n"
    tell(text, given.out)


if __name__ == "__main__":
    main()
