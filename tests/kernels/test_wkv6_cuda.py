"""WKV-6 in CUDA by both schedules, under the stand-in for a GPU and on one. What all forms keep is in test_wkv6.py."""

from functools import partial

import pytest
import torch
from recurrence import DEVICES, amid_nan, assert_guarded, draw_wkv6, run, run_backwards
from recurrence import compare as compare_with

from kernels import wkv6_cuda
from kernels.wkv6 import apply, wkv6_reference

cuda = partial(apply, "cuda")
NAMES = ("y", "final", "dr", "dk", "dv", "dw_raw", "du", "dstate")


@pytest.fixture(params=["fused", "parallel", "two chunks a segment"])
def schedule(request, monkeypatch):
    if request.param in ("fused", "parallel"):
        monkeypatch.setattr(wkv6_cuda, "schedule", request.param)
    else:
        monkeypatch.setattr(wkv6_cuda, "_plan", lambda r: (2, -(-r.shape[1] // 128)))


def compare(xs):
    return compare_with(NAMES, cuda, wkv6_reference, wkv6_reference, xs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 15, 17, 63, 64, 65, 130, 200])
def test_any_number_of_steps(steps, dtype, schedule, device):
    compare(draw_wkv6(2, steps, 3, 8, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [9, 16, 40, 64, 70, 128, 256])
def test_any_head_size(size, dtype, schedule, device):
    compare(draw_wkv6(1, 66 if size <= 64 else 18, 1, size, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 500, 5, 64), (1, 1000, 2, 128), (8, 300, 64, 64)], ids=str)
def test_on_a_gpu(shape, dtype, schedule):
    compare(draw_wkv6(*shape, dtype, "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", ["any", "strongest", "none"])
def test_strong_and_weak_decay(decay, dtype, schedule, device):
    compare(draw_wkv6(1, 150, 2, 16, dtype, device, decay))


@pytest.mark.parametrize("device", DEVICES)
def test_a_weak_decay_keeps_its_digits_next_to_strong_ones(schedule, device):
    """In each place of a tile, and of a chunk, once."""
    xs = draw_wkv6(1, 3 * 64 + 5, 1, 8, device=device, decay="none")
    xs[3][:, ::7], xs[3][:, 1::7] = 12.0, -4.0
    compare(xs)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_a_decay_keeps_its_digits_where_it_is_small(schedule, device):
    """d' = -e^w d, 2e-29 at w = 4.3: as the difference of what other decays have, it would be noise of 1e-7."""
    xs = draw_wkv6(1, 140, 1, 16, device=device)
    strong = torch.zeros(140, dtype=torch.bool)
    strong[[3, 16, 30, 63, 64, 100]] = True
    xs[3][:, strong] = 4.3
    dw = run(cuda, xs)[5][:, strong].double()
    exact = run(wkv6_reference, [x.double() for x in xs], torch.float32)[5][:, strong]
    assert 0 < exact.abs().max() < 1e-25
    assert (dw - exact).norm() < 3e-5 * exact.norm()  # 74 of d's exponent's units in the last place


@pytest.mark.parametrize("device", DEVICES)
def test_decays_of_0_with_large_numbers(schedule, device):
    xs = draw_wkv6(1, 70, 1, 16, device=device, decay="any")
    xs[3][:, ::3] = 80.0
    xs[:3] = [x * 1e4 for x in xs[:3]]
    assert all(x.isfinite().all() for x in compare(xs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_are_alike(dtype, schedule, device):
    xs = draw_wkv6(1, 100, 2, 16, dtype, device)
    xs[1] = (xs[1][:, :1] + 1e-2 * xs[1]).to(dtype)
    compare(xs)


def test_nothing_is_read_before_it_is_written_nor_written_elsewhere(schedule, monkeypatch):
    assert_guarded(wkv6_cuda, [amid_nan(x) for x in draw_wkv6(2, 150, 2, 9)], monkeypatch)


def test_the_order_of_threads_changes_no_bit(schedule):
    """Where a barrier is missing, it would."""
    for dtype in (torch.float32, torch.bfloat16):
        xs = draw_wkv6(1, 150, 1, 40, dtype)
        assert all(torch.equal(x, y) for x, y in zip(run_backwards(cuda, xs, "wkv6"), run(cuda, xs), strict=True))


@pytest.mark.gpu
def test_two_runs_are_equal_to_the_bit(schedule):
    xs = draw_wkv6(4, 1000, 8, 64, torch.bfloat16, "cuda")
    assert all(torch.equal(x, y) for x, y in zip(run(cuda, xs), run(cuda, xs), strict=True))


def test_nothing_is_kept_when_nobody_will_ask(schedule):
    xs = draw_wkv6(1, 150, 1, 16)
    y, final, kept = wkv6_cuda.forward(*xs, False)
    same_y, same_final, states = wkv6_cuda.forward(*xs, True)
    assert torch.equal(y, same_y)
    assert torch.equal(final, same_final)
    assert kept.numel() == 0
    assert states.numel() == 3 * xs[5].numel()


def test_memory_that_is_not_aligned():
    xs = draw_wkv6(1, 20, 1, 16, torch.bfloat16)
    odd = [amid_nan(x, 1) for x in xs]
    assert odd[0].is_contiguous()
    assert odd[0].data_ptr() % 16
    assert all(torch.equal(x, y) for x, y in zip(run(cuda, odd), run(cuda, xs), strict=True))


def test_nan_is_passed_on(schedule):
    """What cuts digits off must not cut off that one."""
    for dtype in (torch.float32, torch.bfloat16):
        for i in range(5):
            xs = draw_wkv6(1, 70, 1, 8, dtype)
            xs[i].view(-1)[3] = torch.nan
            y, final, *_ = wkv6_cuda.forward(*xs, False)
            assert y.isnan().any()
            assert final.isnan().any() or i in (0, 4)


def test_heads_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="heads have 260 channels; CUDA's WKV-6 takes 256 at most; say op='triton'"):
        cuda(*draw_wkv6(1, 2, 1, 260))


@pytest.mark.parametrize(
    ("heads", "chunks", "plan"),
    [(1, 16, (1, 16)), (33, 16, (1, 16)), (44, 16, (2, 8)), (176, 16, (6, 3)), (264, 16, (16, 1))],
)
def test_segments_fill_the_gpu(heads, chunks, plan, monkeypatch):
    class Properties:
        multi_processor_count = 132

    class Stub:
        is_cuda, device, shape = True, "cuda", (1, 64 * chunks, heads, 64)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert wkv6_cuda._plan(Stub) == plan
