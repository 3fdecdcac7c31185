"""WKV-4 in CUDA by both schedules, under the stand-in for a GPU and on one. What all forms keep is in test_wkv4.py."""

from functools import partial

import pytest
import torch
from recurrence import DEVICES, amid_nan, assert_guarded, run, run_backwards
from recurrence import compare as compare_with

from kernels import wkv4_cuda
from kernels.wkv4 import NOTHING, apply, wkv4_reference

cuda = partial(apply, "cuda")
NAMES = ("y", "sums", "dk", "dv", "dw", "du", "dstate")
DECAYS = {"usual": (-5.0, 3.0), "any": (-15.0, 15.0), "strongest": (25.0, 25.0), "none": (-15.0, -15.0)}


@pytest.fixture(params=["fused", "parallel", "two chunks a segment"])
def schedule(request, monkeypatch):
    if request.param in ("fused", "parallel"):
        monkeypatch.setattr(wkv4_cuda, "schedule", request.param)
    else:
        monkeypatch.setattr(wkv4_cuda, "_plan", lambda k: (2, -(-k.shape[1] // 64)))


def draw(batch, steps, channels, dtype=torch.float32, device="cpu", decay="usual", largest_key=None, start=False):
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, steps, channels)
    k = randn(*shape) if largest_key is None else uniform(-largest_key, largest_key, *shape)
    xs = [k, randn(*shape), uniform(*DECAYS[decay], channels), randn(channels)]
    a, b, p = randn(batch, channels), 0.1 + randn(batch, channels).abs(), randn(batch, channels)
    if start:
        a, b, p = torch.zeros_like(a), torch.zeros_like(b), torch.full_like(p, NOTHING)
    return [x.to(device, dtype) for x in xs] + [torch.stack((a, b, p), 1).float().to(device)]


def compare(xs):
    """The last sums are compared in one unit: p is as it happens to be rounded."""
    unit = wkv4_reference(*(x.double() for x in xs))[1][:, 2:].round()

    def in_unit(op):
        def sums(*ys):
            y, final = op(*ys)
            return y, final[:, :2] * torch.exp(final[:, 2:].detach() - unit.to(final))

        return sums

    reference = in_unit(wkv4_reference)
    fast = compare_with(NAMES, in_unit(cuda), reference, reference, xs)
    assert fast[6][:, 2].eq(0).all()
    return fast


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 15, 17, 32, 63, 64, 65, 130, 300])
def test_any_number_of_steps(steps, dtype, schedule, device):
    compare(draw(2, steps, 40, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 64, 65, 129])
def test_any_number_of_channels(channels, schedule, device):
    compare(draw(3, 70, channels, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 700, 768), (8, 300, 4096)], ids=str)
def test_on_a_gpu(shape, dtype, schedule):
    compare(draw(*shape, dtype, "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest_key", [1.0, 50.0])
@pytest.mark.parametrize("decay", ["any", "strongest", "none"])
@pytest.mark.parametrize("start", [True, False])
def test_any_decay_and_large_keys(start, decay, largest_key, schedule, device):
    compare(draw(1, 140, 128, device=device, decay=decay, largest_key=largest_key, start=start))


@pytest.mark.parametrize("device", DEVICES)
def test_exponents_far_from_0_are_not_rounded_away(schedule, device):
    """At p = 1000 each step rounds it by 3e-5: the sums make up for that, in which the form is better than the reference."""
    xs = draw(1, 200, 16, device=device, decay="none")
    xs[0] = xs[0] + 1000
    xs[4][:, 2] += 1000
    y, final = cuda(*xs)
    exact, sums = wkv4_reference(*(x.double() for x in xs))
    assert (y - exact).norm() < 1e-4 * exact.norm()
    scaled = final[:, :2] * torch.exp(final[:, 2:].double() - sums[:, 2:])
    assert (scaled - sums[:, :2]).norm() < 1e-4 * sums[:, :2].norm()


def test_nothing_is_read_before_it_is_written_nor_written_elsewhere(schedule, monkeypatch):
    assert_guarded(wkv4_cuda, [amid_nan(x) for x in draw(2, 150, 70)], monkeypatch)


def test_the_order_of_threads_changes_no_bit(schedule):
    """Where a barrier is missing, it would."""
    xs = draw(2, 150, 70)
    assert all(torch.equal(x, y) for x, y in zip(run_backwards(cuda, xs, "wkv4"), run(cuda, xs), strict=True))


@pytest.mark.gpu
def test_two_runs_are_equal_to_the_bit(schedule):
    xs = draw(4, 1000, 2560, torch.bfloat16, "cuda")
    assert all(torch.equal(x, y) for x, y in zip(run(cuda, xs), run(cuda, xs), strict=True))


def test_nothing_is_kept_when_nobody_will_ask(schedule):
    xs = draw(1, 150, 16)
    y, final, kept = wkv4_cuda.forward(*xs, False)
    same_y, same_final, states = wkv4_cuda.forward(*xs, True)
    assert torch.equal(y, same_y)
    assert torch.equal(final, same_final)
    assert kept.numel() == 0
    assert states.numel() == 6 * xs[4].numel()


@pytest.mark.parametrize(
    ("batch", "channels", "chunks", "plan"),
    [(1, 768, 32, (1, 32)), (1, 4096, 64, (2, 32)), (4, 2560, 64, (5, 13)), (8, 4096, 128, (128, 1))],
)
def test_segments_fill_the_gpu(batch, channels, chunks, plan, monkeypatch):
    class Properties:
        multi_processor_count = 132

    class Stub:
        is_cuda, device, shape = True, "cuda", (batch, 32 * chunks, channels)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert wkv4_cuda._plan(Stub) == plan
