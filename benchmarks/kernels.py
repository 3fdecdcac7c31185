"""The operators against their floor: the matrix products of the layer they stand in, on the same machine in the same run.

python -m benchmarks.kernels
"""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.machine import describe
from kernels.head_loss import head_loss, head_loss_reference
from kernels.wkv7 import wkv7

REPEATS = 7


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median of each call, the calls taking turns so that other load on the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def wkv_rows(batch: int, steps: int, heads: int, size: int) -> str:
    channels = heads * size
    shape = (batch, steps, heads, size)
    kappa = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    inputs = [torch.randn(shape) for _ in range(4)] + [-kappa, kappa * torch.rand(shape)]
    inputs = [x.requires_grad_() for x in inputs]
    state = torch.zeros(batch, heads, size, size)
    x, w = torch.randn(batch * steps, channels, requires_grad=True), torch.randn(channels, 12 * channels)
    dy = torch.randn(shape)

    def both(op: str) -> None:
        y, _ = wkv7(*inputs, state, op=op)
        torch.autograd.grad(y, inputs, dy)

    def products() -> None:
        y = x @ w
        torch.autograd.grad(y, x, y.detach())

    t = milliseconds(
        {
            "torch": lambda: both("torch"),
            "forward": lambda: wkv7(*[i.detach() for i in inputs], state, op="torch"),
            "reference": lambda: both("reference"),
            "products": products,
        }
    )
    return (
        f"| B{batch} T{steps} H{heads} N{size} | {t['forward']:.1f} | {t['torch']:.1f} | {t['reference']:.0f} | "
        f"{t['products']:.1f} | {t['torch'] / t['products']:.2f} |"
    )


def head_rows(rows: int, channels: int, vocab: int) -> str:
    h, w = torch.randn(rows, channels, requires_grad=True), torch.randn(vocab, channels) * 0.02
    targets = torch.randint(0, vocab, (rows,))

    def products() -> None:
        z = h.detach() @ w.mT
        z @ w

    t = milliseconds(
        {
            "ours": lambda: torch.autograd.grad(head_loss(h, w, targets), h),
            "eager": lambda: torch.autograd.grad(head_loss_reference(h, w, targets), h),
            "products": products,
        }
    )
    columns = f"{t['ours']:.0f} | {t['eager']:.0f} | {t['products']:.0f} | {t['ours'] / t['products']:.2f}"
    return f"| R{rows} C{channels} V{vocab} | {columns} |"


def main() -> None:
    print(f"{describe()}; medians of {REPEATS}\n")
    print(
        "WKV-7, forward and backward, milliseconds. Products: the layer's 12 C^2 forward and their input gradient (LoRA).\n"
    )
    print("| shape | chunked, forward | chunked, both | step by step, both | products | chunked / products |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for shape in ((8, 256, 2, 64), (1, 512, 12, 64), (1, 1024, 32, 64)):
        print(wkv_rows(*shape), flush=True)
    print(
        "\nHead and cross-entropy with a frozen head, loss and gradient, milliseconds. Products: logits, and their way back.\n"
    )
    print("| shape | in blocks | eager | products | in blocks / products |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for shape in ((2048, 128, 65536), (1024, 768, 65536)):
        print(head_rows(*shape), flush=True)


if __name__ == "__main__":
    main()
