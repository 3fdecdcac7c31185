"""WKV-7 in CUDA by both schedules, under the stand-in for a GPU and on one. What all forms keep is in test_wkv7.py."""

from functools import cache, partial

import pytest
import torch
from recurrence import DEVICES, amid_nan, assert_guarded, compare, draw_wkv7, judge, run, run_backwards

from kernels import wkv7_cuda
from kernels.wkv7 import apply, wkv7_reference

cuda = partial(apply, "cuda")
NAMES = ("y", "final", "dr", "dw_raw", "dk", "dv", "da", "db", "dstate")
SOURCES = wkv7_cuda.SOURCES.values()
LITTLE = 99 << 10
"""Bytes of shared memory that a block has on GPUs which have little: sm_86, sm_89, sm_120."""


@pytest.fixture(params=["fused", "parallel"])
def schedule(request, monkeypatch):
    monkeypatch.setattr(wkv7_cuda, "schedule", request.param)


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(wkv7_cuda, "_plan", partial(plan, limit=LITTLE))


def plan(batch, steps, heads, size, dtype, device, schedule, limit):
    result = torch.empty(len(wkv7_cuda.Plan._fields), dtype=torch.int64)
    asked = ("fused", "parallel", "auto").index(schedule)
    shape = (batch, steps, heads, size, dtype == torch.bfloat16, asked, 0)
    wkv7_cuda._call("rwkv_wkv7_plan", "10q", torch.empty(1, size, device=device), *shape, limit, result)
    return wkv7_cuda.Plan(*result.tolist())


@cache
def wanted(*shape, **kwargs):
    """Inputs, and what the reference makes of them in their precision and in float64: once for all schedules."""
    xs = draw_wkv7(*shape, **kwargs)
    return xs, run(wkv7_reference, xs), run(wkv7_reference, [x.double() for x in xs], xs[0].dtype)


def prove(*shape, **kwargs):
    xs, slow, exact = wanted(*shape, **kwargs)
    judge(NAMES, run(cuda, xs), slow, exact, narrow=True)


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 15, 16, 17, 63, 64, 65, 100])
def test_any_number_of_steps(steps, dtype, schedule, device):
    prove(2 if steps < 20 else 1, steps, 1, 64, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 9, 16, 40, 96, 128, 256])
def test_any_head_size(size, dtype, schedule, device):
    """Of the largest few go through a second segment: they take seconds."""
    prove(1, 66 if size <= 64 or (dtype == torch.bfloat16 and size >= 128) else 18, 1, size, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_heads_are_told_apart(schedule, device):
    prove(2, 66, 2, 16, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [72, 136])
def test_gpus_of_little_shared_memory(size, dtype, schedule, little_memory):
    """Several blocks share a head's values, and add up their parts of the keys' gradients."""
    prove(1, 18 if size == 72 or dtype == torch.bfloat16 else 3, 1, size, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 500, 5, 64), (1, 1000, 2, 128), (8, 300, 64, 64)], ids=str)
def test_on_a_gpu(shape, dtype, schedule):
    prove(*shape, dtype, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", ["any", "strongest", "none"])
def test_strong_and_weak_decay(decay, dtype, schedule, device):
    prove(1, 70, 1, 16, dtype, device, decay)


@pytest.mark.parametrize("device", DEVICES)
def test_a_weak_decay_keeps_its_digits_next_to_strong_ones(schedule, device):
    """In each place of a chunk once."""
    xs = draw_wkv7(1, 70, 1, 8, device=device, decay="none")
    xs[1][:, ::7], xs[1][:, 1::7] = 12.0, -4.0
    compare(NAMES, cuda, wkv7_reference, wkv7_reference, xs)


@pytest.mark.parametrize("device", DEVICES)
def test_the_decays_gradient_has_digits_where_the_sigmoid_is_flat(schedule, device):
    xs = draw_wkv7(1, 70, 1, 8, device=device, decay="strongest")
    exact = run(wkv7_reference, [x.double() for x in xs], torch.float32)[3]
    assert (run(cuda, xs)[3] - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_are_alike(dtype, schedule, device):
    prove(1, 70, 2, 64, dtype, device, alike=0.95)


@pytest.mark.parametrize("size", [9, 16])
def test_nothing_is_read_before_it_is_written_nor_written_elsewhere(size, schedule, monkeypatch):
    xs = [amid_nan(x) for x in draw_wkv7(2 if size == 9 else 1, 66, 1, size)]
    assert_guarded(wkv7_cuda, xs, monkeypatch, all_written=False)  # of scratch for whole segments


def test_nor_by_blocks_that_share_a_head(schedule, little_memory, monkeypatch):
    assert_guarded(wkv7_cuda, [amid_nan(x) for x in draw_wkv7(1, 18, 1, 72)], monkeypatch, all_written=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype, schedule):
    """Where a barrier is missing, it would."""
    xs = draw_wkv7(1, 90, 1, 40, dtype)
    assert equal(run_backwards(cuda, xs, *SOURCES), run(cuda, xs))


@pytest.mark.parametrize("size", [72, 136])
def test_nor_that_of_threads_of_large_heads(size, schedule, request):
    """Those on GPUs of little shared memory go through the same code, and another kernel."""
    xs = draw_wkv7(1, 34 if size == 72 else 18, 1, size, torch.bfloat16)
    if size == 136:
        request.getfixturevalue("little_memory")
    assert equal(run_backwards(cuda, xs, *SOURCES), run(cuda, xs))


@pytest.mark.parametrize(
    "shape", [pytest.param((1, 70, 1, 16), id="small"), pytest.param((4, 1000, 8, 64), marks=pytest.mark.gpu)]
)
def test_two_runs_are_equal_to_the_bit(shape, schedule):
    xs = draw_wkv7(*shape, torch.bfloat16, "cpu" if shape[0] == 1 else "cuda")
    assert equal(run(cuda, xs), run(cuda, xs))


def test_nothing_is_kept_when_nobody_will_ask(schedule):
    xs = draw_wkv7(1, 150, 1, 16)
    y, final, kept = wkv7_cuda.forward(*xs, False)
    same_y, same_final, states = wkv7_cuda.forward(*xs, True)
    assert torch.equal(y, same_y)
    assert torch.equal(final, same_final)
    assert kept.numel() == 0
    assert states.numel() == 3 * xs[6].numel()


def test_memory_that_is_not_aligned(schedule):
    for dtype in (torch.float32, torch.bfloat16):
        xs = draw_wkv7(1, 20, 1, 16, dtype)
        odd = [amid_nan(x, 1) for x in xs]
        assert odd[0].is_contiguous()
        assert odd[0].data_ptr() % 16
        assert equal(run(cuda, odd), run(cuda, xs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_passed_on(dtype, schedule):
    """What cuts digits off must not cut off that one."""
    for i in range(7):
        xs = draw_wkv7(1, 20 if i < 6 else 70, 1, 8, dtype)
        xs[i].view(-1)[3] = torch.nan
        for name, got, want in zip(NAMES, run(cuda, xs), run(wkv7_reference, xs), strict=True):
            assert (got.isnan() | ~want.isnan()).all(), (i, name)


def test_heads_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="heads have 257 channels; CUDA's WKV-7 takes 256 at most; say op='triton'"):
        cuda(*draw_wkv7(1, 2, 1, 257))


@pytest.mark.parametrize(
    ("shape", "parallel"),
    [
        ((1, 64, 1, 64), False), ((1, 128, 40, 64), False),  # too few segments to gain
        ((1, 512, 12, 64), True), ((1, 1024, 40, 64), True), ((1, 4096, 12, 64), True), ((1, 2048, 8, 128), True),
        ((1, 4096, 132, 64), False), ((8, 4096, 64, 64), False), ((4, 1024, 64, 64), False),  # heads fill the GPU
    ],
)  # fmt: skip
def test_time_is_gone_through_in_parallel_where_heads_do_not_fill_the_gpu(shape, parallel):
    """That of 132 multiprocessors for which the stand-in stands."""
    for dtype in (torch.float32, torch.bfloat16):
        found = plan(*shape, dtype, "cpu", "auto", 0)
        assert found.parallel == parallel
        batch, steps, heads, size = shape
        ends = batch * heads * steps // wkv7_cuda.SEGMENT * size**2 if parallel else 0
        assert found.ends == ends
        assert (found.forward_maps > 2 * ends) == parallel


@pytest.mark.parametrize(
    ("size", "dtype", "memory", "warps"),
    [
        (64, torch.float32, LITTLE, 4), (128, torch.float32, LITTLE, 2), (128, torch.bfloat16, 163 << 10, 2),
        (128, torch.float32, 227 << 10, 2), (128, torch.bfloat16, 227 << 10, 8), (256, torch.float32, LITTLE, 1),
        (256, torch.float32, 163 << 10, 1), (256, torch.bfloat16, 163 << 10, 4), (256, torch.float32, 227 << 10, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", ["fused", "parallel"])
def test_a_block_has_fewer_warps_where_shared_memory_is_short(size, dtype, memory, warps, asked):
    found = plan(1, 128, 2, size, dtype, "cpu", asked, memory)
    assert found.warps == warps
    assert found.parallel == (asked == "parallel")
    splits = max(64, 1 << (size - 1).bit_length()) // (16 * warps)
    assert found.parts == (5 * splits * 2 * 128 * size if splits > 1 else 0)
