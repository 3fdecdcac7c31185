"""The operators on a GPU against their floors and against public kernels, and the memory of a training step; all in one run.

    python -m benchmarks.gpu [FOLDER]

writes FOLDER/<device>-<date>.json and .md (benchmarks/results if none is given). It needs torch, triton and nvcc alone.

Public kernels take part where they can be had: fla-core and wind_rwkv where they are installed, the official ones where
$RWKV_LM names a clone of BlinkDL/RWKV-LM.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import describe
from benchmarks.train_step import lora
from kernels import choice, time_mix7, token_shift, wkv4, wkv6, wkv7
from kernels.channel_mix import relu_squared
from kernels.head_loss import head_loss
from rwkv_core.adapters import attach
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import Linear
from rwkv_core.quantize import Form, Packed, QuantizedLinear

REPEATS = 9

Call = Callable[..., Any]


class Sizes(NamedTuple):
    """What is measured; the small ones rehearse the benchmark on a CPU."""

    wkv7: Sequence[tuple[int, int, int, int]] = ((8, 4096, 64, 64), (1, 1024, 40, 64), (1, 4096, 12, 64))
    """(B, T, H, N); the first is where a GPU is full, the others where micro-batch 1 leaves it idle."""
    wkv6: Sequence[tuple[int, int, int, int]] = ((8, 4096, 64, 64), (1, 1024, 40, 64))
    wkv4: Sequence[tuple[int, int, int]] = ((8, 4096, 4096), (1, 1024, 2560))
    errors: tuple[int, int, int, int] = (1, 256, 2, 64)
    around: tuple[int, int, int, int] = (1, 4096, 40, 64)
    """(B, T, H, N) of what surrounds the recurrence."""
    vocab: int = 65536
    steps: Sequence[tuple[str, int, int]] = (
        ("0.1B", 12, 768),
        ("0.4B", 24, 1024),
        ("1.5B", 24, 2048),
        ("2.9B", 32, 2560),
    )
    """Models by name, layers and channels, trained by LoRA of rank 64."""
    forms: Sequence[Form] = ("none", "int8", "nf4")
    """How their frozen matrices are kept."""
    context: int = 1024
    copied: int = 2**31
    """Bytes that measure the bandwidth."""


SMALL = Sizes(
    wkv7=((1, 20, 2, 16),), wkv6=((1, 20, 2, 16),), wkv4=((1, 20, 32),), errors=(1, 20, 2, 16), around=(1, 20, 2, 16), vocab=99,
    steps=(("tiny", 2, 64),), context=20, copied=2**16,
)  # fmt: skip

LEAN = {"0.1B": 1.35, "0.4B": 2.53, "1.5B": 5.77, "2.9B": 10.0}
"""GB that a step of LoRA (rank 64, bfloat16 base, context 1024, one row, no checkpointing) needs on paper, the CUDA context
of 0.45 GB included: base, adapter with float32 moments, and 12 values of C a token and layer."""

DOCUMENTED = {
    "0.1B": {"none": 2.7, "int8": 2.5, "nf4": 2.4},
    "0.4B": {"none": 3.1, "int8": 2.9, "nf4": 2.7},
    "1.5B": {"none": 5.6, "int8": 4.5, "nf4": 3.9},
    "2.9B": {"none": 8.8, "int8": 6.7, "nf4": 5.7},
}
"""GB that RWKV-PEFT's documents give for RWKV-7 at rank 64, context 1024, micro-batch 1, deepspeed_stage_1 and grad_cp."""

CONTEXT_GB = 0.45


class Clock:
    """Times calls on a device. The calls of one comparison take turns, so that other load and heat meet all alike."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, calls: dict[str, Call]) -> dict[str, float]:
        """Median milliseconds of each; one that fails is left out, and says why."""
        working: dict[str, Call] = {}
        for name, call in calls.items():
            try:
                for _ in range(2):  # compiles, and warms up
                    call()
                self._wait()
                working[name] = call
            except Exception as error:
                print(
                    f"  {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True
                )
        times: dict[str, list[float]] = {name: [] for name in working}
        for _ in range(REPEATS):
            for name, call in working.items():
                times[name].append(self._once(call))
        return {name: statistics.median(values) for name, values in times.items()}

    def _once(self, call: Call) -> float:
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def bandwidth(clock: Clock, size: int) -> float:
    """GB/s of a copy, read and written."""
    x = torch.empty(size, dtype=torch.uint8, device=clock.device)
    y = torch.empty_like(x)
    return 2 * size / clock({"copy": lambda: y.copy_(x)})["copy"] / 1e6


def with_gradients(call: Call, inputs: Sequence[Tensor]) -> Call:
    """The call and its backward, under a cotangent that is made once."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    cotangents: list[Tensor] = []

    def both() -> None:
        y = call(*inputs)
        outputs = [y] if isinstance(y, Tensor) else [z for z in y if z.requires_grad]
        if not cotangents:
            cotangents.extend(torch.randn_like(z) for z in outputs)
        torch.autograd.grad(outputs, inputs, cotangents)

    return both


# The recurrences.


def draw(name: str, shape: Sequence[int], device: str) -> list[Tensor]:
    """Inputs like the model's, bfloat16, and a float32 state."""
    torch.manual_seed(0)
    batch = shape[0]

    def x(*size: int) -> Tensor:
        return torch.randn(size or tuple(shape), device=device).bfloat16()

    if name == "wkv4":
        channels = shape[2]
        state = torch.zeros(batch, 3, channels, device=device)
        state[:, 2] = wkv4.NOTHING
        return [x(), x(), x(channels), x(channels), state]
    heads, size = shape[2:]
    state = torch.zeros(batch, heads, size, size, device=device)
    w_raw = (torch.rand(tuple(shape), device=device) * 8 - 6).bfloat16()
    if name == "wkv6":
        return [x(), x(), x(), w_raw, x(heads, size), state]
    kappa = torch.nn.functional.normalize(x().float(), dim=-1)
    rate = torch.rand(tuple(shape), device=device)
    return [x(), w_raw, x(), x(), (-kappa).bfloat16(), (kappa * rate).bfloat16(), state]


MOVED = {"wkv4": (3, 7), "wkv6": (5, 14), "wkv7": (7, 20)}
"""Tensors of the inputs' size that must be read and written, forward, and forward and backward."""

OPERATORS = {"wkv4": wkv4, "wkv6": wkv6, "wkv7": wkv7}


def ours(name: str, device: str) -> dict[str, Call]:
    """Our forms that work here, each schedule of CUDA's WKV-7 for itself."""
    operator: Any = OPERATORS[name]
    x = torch.zeros(1, device=device)
    forms: list[choice.Form] = [
        f for f in choice.WKV if not choice._obstacle(name, f, x) and (name != "wkv4" or f != "fla")
    ]
    return {form: lambda *xs, form=form: operator.apply(form, *xs) for form in forms}


def public(size: int) -> Iterator[tuple[str, Call]]:
    """Public kernels of WKV-7 beside fla's, for head size 64; they have no state, or one in bfloat16."""
    try:
        from wind_rwkv.rwkv7 import attn_chunked_cuda, load_chunked_cuda

        load_chunked_cuda(size)

        def wind(r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, _state: Tensor) -> Tensor:
            w = -torch.nn.functional.softplus(-w_raw) - 0.5  # the older spelling of the same decay
            return attn_chunked_cuda(r, w, k, v, a, b)[0]

        yield "wind_rwkv chunked", wind
    except Exception as error:
        print(f"  wind_rwkv: {error}", flush=True)
    try:
        yield "official clampw_v3", _official(size)
    except Exception as error:
        print(f"  official clampw_v3: {type(error).__name__}: {error}", flush=True)


def _official(size: int) -> Call:
    from torch.utils.cpp_extension import load

    folder = Path(os.environ["RWKV_LM"]) / "RWKV-v7" / "train_temp" / "cuda"
    flags = [f"-D_N_={size}", "-D_CHUNK_LEN_=16", "--use_fast_math", "-O3", "-Xptxas", "-O3"]
    sources = [str(folder / f"rwkv7_clampw_v3{end}") for end in ("_for_h100.cu", ".cpp")]
    load(name="rwkv7_clampw_v3", sources=sources, is_python_module=False, extra_cuda_cflags=flags)

    class Official(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Tensor) -> Tensor:
            batch, steps, heads, n = xs[0].shape
            y = torch.empty_like(xs[3])
            s = xs[0].new_empty(batch, heads, steps // 16, n, n, dtype=torch.float32)
            sa = xs[0].new_empty(batch, steps, heads, n, dtype=torch.float32)
            torch.ops.rwkv7_clampw_v3.forward(*xs, y, s, sa)
            ctx.save_for_backward(*xs, s, sa)
            return y

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Any:
            *xs, s, sa = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in xs]
            torch.ops.rwkv7_clampw_v3.backward(*xs, dy[0].contiguous(), s, sa, *grads)
            return tuple(grads)

    return lambda *xs: Official.apply(*xs[:6])


def error(name: str, call: Call, shape: Sequence[int], device: str) -> float:
    """The largest relative error (root mean square) of the output and of all gradients of the timed inputs, against float64."""
    xs = draw(name, shape, device)
    timed = [i for i, x in enumerate(xs) if x.shape == xs[0].shape]

    def results(f: Call, inputs: list[Tensor]) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = f(*inputs)
        y = y if isinstance(y, Tensor) else y[0]
        torch.manual_seed(1)
        dy = torch.randn(y.shape, device=device).bfloat16().to(y)
        return [y.detach(), *torch.autograd.grad(y, [inputs[i] for i in timed], dy)]

    reference = getattr(OPERATORS[name], f"{name}_reference")
    exact = results(reference, [x.double() for x in xs])
    pairs = zip(results(call, xs), exact, strict=True)
    return max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)


def recurrence(name: str, sizes: Sizes, clock: Clock, copy: float) -> list[dict[str, Any]]:
    """A row for each shape and implementation."""
    calls = ours(name, clock.device)
    if name == "wkv7" and clock.device != "cpu":
        calls |= dict(public(sizes.errors[3]))
    batch, steps, heads, size = sizes.errors
    small = (batch, steps, heads * size) if name == "wkv4" else sizes.errors
    errors = {n: error(name, call, small, clock.device) for n, call in calls.items()}
    rows = []
    for shape in getattr(sizes, name):
        print(f"{name} {shape}", flush=True)
        xs = draw(name, shape, clock.device)
        forward = clock({n: lambda call=call, xs=xs: _without(call, xs) for n, call in calls.items()})
        both = clock({n: with_gradients(call, xs) for n, call in calls.items()})
        for n in both:
            floor = MOVED[name][1] * xs[0].numel() * 2 / copy / 1e6
            rows.append(
                {
                    "operator": name, "shape": shape, "implementation": n, "forward_ms": forward.get(n), "both_ms": both[n],
                    "of_bandwidth": floor / both[n], "error": errors[n],
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def _without(call: Call, xs: Sequence[Tensor]) -> None:
    call(*xs)


# What surrounds them.


def neighbours(sizes: Sizes, clock: Clock, copy: float) -> list[dict[str, Any]]:
    """A row for each, compiled and by torch, forward and backward with frozen parameters."""
    batch, steps, heads, size = sizes.around
    channels = heads * size
    torch.manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape or (batch, steps, channels), device=clock.device).bfloat16()

    mus = [x(channels) for _ in range(6)]
    norm = token_shift.Norm(x(channels), x(channels), 1e-5)
    by_head = (batch, steps, heads, size)
    weights = (x(channels), x(channels), x(heads, size))
    last, k_k, k_a, hidden = x(batch, channels), x(channels), x(channels), x(batch, steps, 4 * channels)
    head, targets = x(sizes.vocab, channels), torch.randint(0, sizes.vocab, (batch * steps,), device=clock.device)
    prepared, read = [x() for _ in range(5)], [*(x(*by_head) for _ in range(4)), x()]
    forms: dict[str, tuple[Callable[[str], Call], Sequence[Tensor], float]] = {
        "norm, shift, 6 lerps": (lambda op: lambda x: token_shift.mix(x, last, mus, norm, op=op)[0], [x()], 15),
        "prepare": (lambda op: lambda *xs: time_mix7.prepare(*xs, k_k, k_a, size, op=op), prepared, 23),
        "readout": (lambda op: lambda *xs: time_mix7.readout(*xs, *weights, 64e-5, op=op), read, 17),
        "squared ReLU": (lambda op: lambda x: relu_squared(x, op=op), [hidden], 4 * 5),
        "head and loss": (lambda op: lambda h: head_loss(h, head, targets, op=op), [x(batch * steps, channels)], 0),
    }
    rows = []
    for name, (make, inputs, moved) in forms.items():
        print(name, flush=True)
        both = clock({op: with_gradients(make(op), inputs) for op in ("auto", "torch")})
        floor = moved * batch * steps * channels * 2 / copy / 1e6
        for op, ms in both.items():
            rows.append({"piece": name, "implementation": op, "both_ms": ms, "of_bandwidth": floor / ms})
    return rows


# A training step.


def training_steps(sizes: Sizes, clock: Clock) -> list[dict[str, Any]]:
    """Memory and speed of a LoRA step of each model beside each form of its matrices, one row of `context` tokens."""
    rows = []
    for name, layers, channels in sizes.steps:
        for form, again in itertools.product(sizes.forms, (False, True)):
            print(f"training step, {name}, {form}{', blocks made again' if again else ''}", flush=True)
            model = made(layers, channels, sizes.vocab, form, clock.device)
            if again:  # as the documents' settings do (grad_cp=1)
                for block in model.blocks:
                    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
            attach(model, lora(64, ["att.*", "ffn.*"]), seed=0)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
            tokens = torch.randint(0, sizes.vocab, (1, sizes.context + 1), device=clock.device)

            def step(model: Any = model, optimizer: Any = optimizer, tokens: Tensor = tokens) -> None:
                features, _ = model.features(tokens[:, :-1])
                head_loss(features.flatten(0, 1), model.head.weight, tokens[:, 1:].flatten(), 1e-4).backward()
                optimizer.step()
                optimizer.zero_grad()

            if clock.device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found = clock({"step": step})
            peak = torch.cuda.max_memory_allocated() / 1e9 + CONTEXT_GB if clock.device != "cpu" else None
            documented = DOCUMENTED.get(name, {}).get(form)
            if found:
                rows.append(
                    {
                        "model": name,
                        "matrices": form,
                        "blocks made again": "yes" if again else "no",
                        "step_ms": found["step"],
                        "tokens_per_s": sizes.context / found["step"] * 1e3,
                        "peak_gb": peak,
                        "lean_gb": LEAN.get(name) if form == "none" and not again else None,
                        "documents_gb": documented,
                        "of_documents": peak / documented if peak and documented else None,
                    }
                )
            del model, optimizer, step
    return rows


def made(layers: int, channels: int, vocab: int, form: Form, device: str) -> RWKV7:
    """A model of random values in bfloat16; matrix by matrix, the blocks' are packed."""
    with torch.device(device):
        model = RWKV7(RWKV7.new_shape(layers, channels, min(64, channels), vocab)).bfloat16()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
    if form != "none":
        for name, matrix in [(name, m) for name, m in model.blocks.named_modules() if isinstance(m, Linear)]:
            model.blocks.set_submodule(name, QuantizedLinear(Packed(matrix.weight.detach(), form)))
    return model


# The report.


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows with the same keys."""
    if not rows:
        return "none could run\n"

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row[n]) for n in names)} |" for row in rows)]) + "\n"


def measure(device: str, sizes: Sizes, folder: Path) -> Path:
    """Measure everything, and write the two files; the path of the table."""
    clock = Clock(device)
    copy = bandwidth(clock, sizes.copied)
    found = {
        "WKV": [row for name in OPERATORS for row in recurrence(name, sizes, clock, copy)],
        "Around it": neighbours(sizes, clock, copy),
        "LoRA step": training_steps(sizes, clock),
    }
    day, machine = datetime.date.today().isoformat(), describe()
    short = re.sub(r"[^a-z0-9]+", "-", (torch.cuda.get_device_name() if device != "cpu" else "cpu").lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    told = {"date": day, "machine": machine, "copy_gb_per_s": copy, "repeats": REPEATS, **found}
    (folder / f"{short}-{day}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = f"# Measured {day}: `python -m benchmarks.gpu`\n\n{machine}; a copy moves {copy:.0f} GB/s; medians of {REPEATS}.\n"
    for title, rows in found.items():
        text += f"\n## {title}\n\n{table(rows)}"
    path = folder / f"{short}-{day}.md"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: whether it runs, not how fast")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs it on the CPU")
    path = measure("cpu", SMALL, given.folder) if given.rehearse else measure("cuda", Sizes(), given.folder)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
