"""Each optimizer against what it is said to be, and continued where it stopped."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from methods import EXAMPLES
from random_models import VERSIONS, make
from train_settings import train_config

from rwkv_core.adapters import attach
from rwkv_core.config import LoraConfig
from rwkv_core.errors import InputError
from rwkv_core.training import optimizers
from rwkv_core.training.optimizers import Muon, build, groups

HERE = ["adamw", "adamw_8bit", "cpu_adam", "muon"]
"""Kinds that run on a CPU."""

LORA = LoraConfig(
    kind="lora", rank=4, alpha=8, dropout=0.0, dora=False, rank_stabilized=False, targets=("att.*", "ffn.*"), layers="all",
    also=("ln*",), state="none", load=None,
)  # fmt: skip


def config(kind="adamw", **changes):
    momentum = 0.95 if kind == "muon" else None
    return train_config(optimizer={"kind": kind, "momentum": momentum, "weight_decay": 0.1} | changes).optimizer


def model(**changes):
    """Of a size at which bitsandbytes keeps the large matrices' averages in 8 bits."""
    return make(**({"n_layer": 2, "n_embd": 64, "head_size": 16} | changes))


def step(model, optimizer, numbers, scale=1.0):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, generator=generator)
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(model, settings, steps):
    """AdamW as its paper has it, in float64, over the model's groups: the values after some steps."""
    b1, b2 = settings.betas
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    group_of = {id(p): group for group in groups(model, settings) for p in group["params"]}
    state = {name: (torch.zeros_like(p, dtype=torch.float64),) * 2 for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found[name] = p.detach().double()
    for t in range(1, steps + 1):
        generator = torch.Generator().manual_seed(t - 1)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator).double()
            name, group = names[id(p)], group_of[id(p)]
            m, v = state[name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            state[name] = m, v
            x = found[name] * (1 - group["lr"] * group["weight_decay"])
            update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + settings.eps)
            found[name] = x - group["lr"] * update
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["adamw", pytest.param("cpu_adam", marks=pytest.mark.slow)])  # it compiles
def test_adamw_is_adamw(kind, version):
    one, settings = model(version=version), config(kind)
    want = by_hand(one, settings, 5)
    step(one, build(groups(one, settings), settings), range(5))
    for name, x in values(one).items():
        torch.testing.assert_close(x.double(), want[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_8_bits_are_adamw_s_with_rounded_averages():
    """Small tensors are not rounded. The first step of any is lr times the sign, whatever the rounding."""
    one, settings = model(), config("adamw_8bit")
    optimizer = build(groups(one, settings), settings)
    first = by_hand(model(), settings, 1)
    step(one, optimizer, range(1))
    for name, x in values(one).items():
        torch.testing.assert_close(x.double(), first[name], rtol=1e-3, atol=2e-4)
    step(one, optimizer, range(1, 5))
    want = by_hand(model(), settings, 5)
    for (name, x), p in zip(values(one).items(), one.parameters(), strict=True):
        rounded = optimizer.state[p]["state1"].dtype == torch.uint8
        assert rounded is (p.numel() >= 4096), name
        off = (x.double() - want[name]).abs().max()
        assert off < (0.02 if rounded else 1e-5), name
        assert off > (1e-5 if rounded else -1), name


def orthogonalized(update):
    """Muon's five Newton-Schulz iterations of Jordan's post, in the precision that torch takes."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = update.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def test_muon_is_muon_for_the_blocks_matrices_and_adamw_for_the_rest():
    one, settings = model(), config("muon")
    start, rest = values(one), by_hand(one, settings, 1)
    step(one, build(groups(one, settings), settings), range(1))
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for name, x in values(one).items():
        g = torch.randn(x.shape, generator=generator)
        part = name.rpartition(".")[0]
        if name.startswith("blocks.") and isinstance(one.get_submodule(part), torch.nn.Linear):
            chosen.append(name)
            update = 0.05 * g + 0.95 * 0.05 * g  # Nesterov's, of averages that begin at 0
            length = settings.lr * 0.2 * math.sqrt(max(x.shape))
            want = start[name] * (1 - settings.lr * 0.1) - length * orthogonalized(update).float()
            assert (x - want).norm() < 0.05 * (x - start[name]).norm(), name  # its iterations are in bfloat16
        else:
            torch.testing.assert_close(x.double(), rest[name], rtol=1e-5, atol=1e-6)
    assert len(chosen) == 2 * 6


def test_muon_takes_what_an_adapter_trains_beside_matrices():
    one = model()
    attach(one, LORA, seed=0)
    settings = config("muon")
    chosen = [p for group in groups(one, settings) if group["muon"] for p in group["params"]]
    names = {id(p): name for name, p in one.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in chosen} == {"lora_A", "lora_B"}
    assert len(chosen) == 2 * 2 * 6
    build(groups(one, settings), settings)


def test_muon_without_a_matrix_is_refused():
    one, settings = model(), config("muon")
    attach(one, next(c for c in EXAMPLES if c.kind == "state"), seed=0)
    with pytest.raises(
        InputError, match=r"kind = muon: is for the blocks' matrices, of which none is trained; set adamw"
    ):
        build(groups(one, settings), settings)


def test_a_torch_without_muon_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    settings = config("muon")
    with pytest.raises(
        InputError, match=r"kind = muon: torch \S+ does not have it yet; it came with 2.9; install a later"
    ):
        build(groups(model(), settings), settings)


@pytest.mark.parametrize("kind", HERE)
def test_a_saved_state_goes_on_to_the_bit(kind, tmp_path):
    """Through a file, as a checkpoint has it; with rates that change from step to step."""
    settings = config(kind)
    one, other = model(), model()
    optimizer = build(groups(one, settings), settings)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    for number in range(4):
        step(one, optimizer, [number])
        plan.step()
    torch.save({"model": one.state_dict(), "state": optimizer.state_dict(), "plan": plan.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    other.load_state_dict(saved["model"])
    again = build(groups(other, settings), settings)
    plan_again = torch.optim.lr_scheduler.LambdaLR(again, lambda s: 1 / (1 + s))
    again.load_state_dict(saved["state"])
    plan_again.load_state_dict(saved["plan"])
    for number in range(4, 9):
        for trained, by, course in ((one, optimizer, plan), (other, again, plan_again)):
            step(trained, by, [number])
            course.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in again.param_groups]
    found = values(other)
    assert all(torch.equal(x, found[name]) for name, x in values(one).items())


def test_muon_is_one_optimizer():
    settings = config("muon")
    one = model()
    optimizer = build(groups(one, settings), settings)
    assert isinstance(optimizer, Muon)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in one.parameters()}
    step(one, optimizer, range(2))
    assert len(optimizer.state) == len(list(one.parameters()))
    before = values(one)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(one, optimizer, [2])
    assert all(torch.equal(x, before[name]) for name, x in values(one).items()), "the schedule reaches both"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fused_adam", r"kind = fused_adam: it is a program for NVIDIA GPUs, and this run is on cpu; set adamw, which"),
        (
            "adamw_8bit_paged",
            r"kind = adamw_8bit_paged: its pages are an NVIDIA GPU's, and this run is on cpu; set adamw_8bit",
        ),
    ],
)
def test_kinds_of_a_gpu_are_refused_without_one(kind, message):
    settings = config(kind)
    with pytest.raises(InputError, match=message):
        build(groups(model(), settings), settings)


def test_cpu_adam_is_of_what_is_in_the_cpu_s_memory():
    settings = config("cpu_adam")
    with pytest.raises(
        InputError, match=r"kind = cpu_adam: what it steps must be in the CPU's memory, .* on meta; set"
    ):
        build([{"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))]}], settings)


@pytest.mark.parametrize(("kind", "module"), [("adamw_8bit", "bitsandbytes"), ("cpu_adam", "deepspeed.ops.adam")])
def test_a_library_that_is_missing_is_named(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    settings = config(kind)
    package = module.partition(".")[0]
    with pytest.raises(InputError, match=rf"kind = {kind}: needs {package}: .*; pip install {package}, or set adamw"):
        build(groups(model(), settings), settings)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fused_adam", "adamw_8bit", "adamw_8bit_paged", "muon", "adamw"])
def test_on_a_gpu(kind):
    one, settings = model().cuda(), config(kind)
    want = by_hand(model(), settings, 3)
    optimizer = build(groups(one, settings), settings)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for p in one.parameters():
            p.grad = torch.randn(p.shape, generator=generator).cuda()
        optimizer.step()
    if kind in ("adamw", "fused_adam"):
        for name, x in values(one).items():
            torch.testing.assert_close(x.cpu().double(), want[name], rtol=1e-5, atol=1e-6)
    assert all(x.isfinite().all() for x in values(one).values())


def rates_of(model, settings):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["lr"] / settings.lr for g in groups(model, settings) for p in g["params"]}


OWN = {
    "4": {"att.time_decay": 2, "att.time_first": 3}, "5.0": {"att.time_decay": 2, "att.time_first": 3},
    "5.1": {"att.time_decay": 2}, "5.2": {"att.time_decay": 2}, "6": {"att.time_decay": 2}, "7": {"att.w0": 2},
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_s_own_rates_can_be_switched_off(version):
    one = model(version=version)
    found = rates_of(one, config())
    for name, rate in found.items():
        ends = [multiple for end, multiple in OWN[version].items() if name.endswith(end)]
        assert rate == pytest.approx(ends[0] if ends else 1), name
    assert sum(rate != 1 for rate in found.values()) == 2 * len(OWN[version])
    assert set(rates_of(one, config(layerwise_lr=False)).values()) == {1}


def test_rates_by_pattern_count_instead():
    one = model()
    found = rates_of(one, config(rates={"att.w0": 5, "emb.*": 0.5, "att.*": 3}))
    for name, rate in found.items():
        want = 5 if name.endswith("att.w0") else 0.5 if name == "emb.weight" else 3 if ".att." in name else 1
        assert rate == pytest.approx(want), name


def test_rates_of_an_adapter():
    """Hayou and others' LoRA+: B learns 16 times as fast as A."""
    one = model()
    attach(one, LORA, seed=0)
    found = rates_of(one, config(rates={"*.lora_B": 16}))
    assert {name.rpartition(".")[2]: rate for name, rate in found.items() if "lora" in name} == {
        "lora_A": 1, "lora_B": 16
    }  # fmt: skip
    assert len(found) == 2 * 2 * 6 + 6 * 2


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(
        InputError, match=r"rates has 'att.time_decay': each must match a parameter that is trained; there"
    ):
        groups(model(), config(rates={"att.time_decay": 2}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "tf32"])
@pytest.mark.parametrize("before", ["highest", "medium"])
def test_products_are_as_exact_as_asked_for_and_then_as_before(precision, before):
    torch.set_float32_matmul_precision(before)
    try:
        with optimizers.products(precision):
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_process_that_was_killed_while_it_compiled_keeps_nobody_waiting(tmp_path, monkeypatch):
    """torch's lock is left, and would be waited for without end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    with optimizers._own_extensions():
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        (folder / "cpu_adam").mkdir()
        (folder / "cpu_adam" / "lock").touch()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    with optimizers._own_extensions():
        assert not (folder / "cpu_adam" / "lock").exists()
