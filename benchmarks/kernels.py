"""The operators on a CPU against their floor: the matrix products of the layer they stand in, in the same run.

python -m benchmarks.kernels [--threads N] [--rounds N] [--out FILE]
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.machine import describe, parser, pin, tell
from kernels import wkv4, wkv6, wkv7
from kernels.channel_mix import relu_squared
from kernels.head_loss import head_loss, head_loss_reference
from kernels.products import product, put
from kernels.time_mix7 import prepare, readout
from kernels.token_shift import Norm, mix
from rwkv_core import memory

Call = Callable[[], object]

SHAPES = ((1, 512, 12, 64), (8, 256, 2, 64), (1, 1024, 32, 64))
"""(B, T, H, N) of the recurrences; the first is that of the smallest published models."""

HEADS = ((1024, 768, 65536), (2048, 128, 65536))
"""Rows, channels and vocabulary of the head."""


def milliseconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median of each call, the calls taking turns so that other load on the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first builds, and maps memory


def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def layer(version: int, c: int) -> list[tuple[int, int]]:
    """Rows and columns of the matrices of a layer of `c` channels: time mix, channel mix, low-rank pairs."""
    time_mix = [(c, c)] * {4: 4, 6: 5, 7: 4}[version]
    channel_mix = [(c, 4 * c), (4 * c, c)] if version != 6 else [(c, 7 * c // 2), (7 * c // 2, c)]
    ranks = {4: (), 6: (64,), 7: (64, 64, 128, 32)}[version]
    gates = [(c, c)] if version < 7 else []
    shift = [(c, 160), *[(32, c)] * 5] if version == 6 else []
    return time_mix + channel_mix + gates + shift + [size for rank in ranks for size in ((c, rank), (rank, c))]


def products(sizes: Sequence[tuple[int, int]], rows: int) -> Call:
    """Products x W and dy W' of each: forward, and the gradient of the input, as with frozen matrices."""
    inputs = {size: torch.randn(rows, size) for pair in sizes for size in pair}
    weights = [torch.randn(size) for size in sizes]

    def run() -> None:
        for w in weights:
            product(inputs[w.shape[0]], w)
            product(inputs[w.shape[1]], w.mT)

    return run


def both(call: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    """The call and its backward."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = call(*inputs)
    cotangents = [torch.randn_like(z) for z in ([y] if isinstance(y, Tensor) else y)]

    def run() -> None:
        y = call(*inputs)
        torch.autograd.grad([y] if isinstance(y, Tensor) else y, inputs, cotangents)

    return run


def draw(version: int, batch: int, steps: int, heads: int, size: int) -> tuple[list[Tensor], Tensor]:
    """Inputs of a recurrence, and its first state."""
    torch.manual_seed(0)
    shape = (batch, steps, heads, size) if version > 4 else (batch, steps, heads * size)
    x = [torch.randn(shape) for _ in range(4)]
    if version == 4:
        state = torch.zeros(batch, 3, heads * size)
        state[:, 2] = wkv4.NOTHING
        return [*x[:2], torch.randn(shape[-1]), torch.randn(shape[-1])], state
    state = torch.zeros(batch, heads, size, size)
    decay = torch.rand(shape) * 8 - 6
    if version == 6:
        return [*x[:3], decay, torch.randn(heads, size)], state
    kappa = normalize(x[3], dim=-1)
    return [x[0], decay, *x[1:3], -kappa, kappa * torch.rand(shape)], state


def recurrence(version: int, shape: tuple[int, int, int, int], rounds: int) -> list[object]:
    """Times of a recurrence in C++, in torch and step by step."""
    batch, steps, heads, size = shape
    inputs, state = draw(version, *shape)
    operator: Any = {4: wkv4, 6: wkv6, 7: wkv7}[version]

    def run(form: str) -> Callable[..., Any]:
        return lambda *xs: operator.apply(form, *xs, state)

    @torch.no_grad()
    def forward() -> None:
        run("cpu")(*inputs)

    t = milliseconds(
        {
            "forward": forward,
            "cpu": both(run("cpu"), inputs),
            "torch": both(run("torch"), inputs),
            "products": products(layer(version, heads * size), batch * steps),
        },
        rounds,
    )
    slow = milliseconds({"reference": both(run("reference"), inputs)}, 1)["reference"]
    name = f"B{batch} T{steps} H{heads} N{size}" if version > 4 else f"B{batch} T{steps} C{heads * size}"
    return [
        f"wkv{version}",
        name,
        t["forward"],
        t["cpu"],
        t["torch"],
        round(slow),
        t["products"],
        t["cpu"] / t["products"],
    ]


def neighbours(shape: tuple[int, int, int, int], rounds: int) -> list[list[object]]:
    """What surrounds WKV-7, compiled and by torch, with frozen parameters."""
    batch, steps, heads, size = shape
    channels = heads * size
    torch.manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape or (batch, steps, channels))

    mus, norm, last = [x(channels) for _ in range(6)], Norm(x(channels), x(channels), 1e-5), x(batch, channels)
    k_k, k_a, weights = x(channels), x(channels), (x(channels), x(channels), x(heads, size))
    read = [*(x(batch, steps, heads, size) for _ in range(4)), x()]
    forms: dict[str, tuple[Callable[[Any], Callable[..., Any]], list[Tensor]]] = {
        "norm, shift, 6 lerps": (lambda op: lambda x: mix(x, last, mus, norm, op=op)[0], [x()]),
        "key, kappa, value residual": (
            lambda op: lambda *xs: prepare(*xs, k_k, k_a, size, op=op), [x() for _ in range(5)]
        ),
        "group norm, bonus, gate": (lambda op: lambda *xs: readout(*xs, *weights, 64e-5, op=op), read),
        "squared ReLU": (lambda op: lambda x: relu_squared(x, op=op), [x(batch, steps, 4 * channels)]),
    }  # fmt: skip
    rows: list[list[object]] = []
    for name, (make, inputs) in forms.items():
        t = milliseconds({op: both(make(op), inputs) for op in ("cpu", "torch")}, rounds)
        rows.append([name, t["cpu"], t["torch"], t["torch"] / t["cpu"]])
    return rows


def head(rows: int, channels: int, vocab: int, rounds: int) -> list[object]:
    """Times of head and loss, with a frozen head."""
    h, w = torch.randn(rows, channels, requires_grad=True), torch.randn(vocab, channels) * 0.02
    targets = torch.randint(0, vocab, (rows,))
    out, back = torch.empty(rows, vocab), torch.empty(rows, channels)

    @torch.no_grad()
    def floor() -> None:
        put(out, h, w.mT)
        put(back, out, w)

    t = milliseconds(
        {
            "ours": lambda: torch.autograd.grad(head_loss(h, w, targets), h),
            "eager": lambda: torch.autograd.grad(head_loss_reference(h, w, targets), h),
            "products": floor,
        },
        rounds,
    )
    return [f"R{rows} C{channels} V{vocab}", t["ours"], t["eager"], t["products"], t["ours"] / t["products"]]


def measure(shapes: Sequence[tuple[int, int, int, int]], heads: Sequence[tuple[int, int, int]], rounds: int) -> str:
    """The tables."""
    lines = [
        "Milliseconds, float32. Products: all matrices of the layer, forward and the gradient of the input.",
        "",
        "| | shape | C++, forward | C++, both | torch, both | step by step, both | products | C++, both / products |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(recurrence(version, shape, rounds)) for version in (7, 6, 4) for shape in shapes),
        "",
        "What surrounds WKV-7, forward and backward, at the first shape.",
        "",
        "| | C++ | torch | torch / C++ |",
        "| --- | ---: | ---: | ---: |",
        *(row(cells) for cells in neighbours(shapes[0], rounds)),
        "",
        "Head and cross-entropy with a frozen head, loss and gradient. Products: the logits, and their way back.",
        "",
        "| shape | in blocks | eager | products | in blocks / products |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(row(head(*shape, rounds)) for shape in heads),
    ]
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    pin(given.threads)
    with memory.reused():  # as in training
        tables = measure(SHAPES, HEADS, given.rounds)
    text = f"{describe()}; medians of {given.rounds}\n\n{tables}\n"
    tell(text, given.out)


if __name__ == "__main__":
    main()
