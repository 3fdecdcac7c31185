"""What a run takes: exact where it can be, near what is measured elsewhere, and settings that fit."""

import re
from dataclasses import replace

import pytest
import torch
from checkpoints import official
from methods import EXAMPLES, OTHERS, SOME
from train_settings import train_config

from rwkv_core import checkpoint, models, plan
from rwkv_core.adapters import attach
from rwkv_core.adapters.peft import all_tensors
from rwkv_core.config import FullConfig, LoraConfig, ModelConfig, PeftConfig
from rwkv_core.errors import InputError
from rwkv_core.training.optimizers import build, groups

LORA = EXAMPLES[0]
FULL = next(x for x in EXAMPLES if isinstance(x, FullConfig))
CARD = plan.Room("cuda", 24 << 30, 0)
HERE = plan.Room("cpu", 24 << 30, 500 << 20)


def settings(adapter=LORA, quantize="none", **train):
    model = ModelConfig(base="none", head_size_divisor=None, op="auto", quantize=quantize)
    return plan.Settings(model, adapter, train_config(**{"ctx_len": 64, "micro_batch": 2} | train))


@pytest.fixture(scope="module")
def base():
    return plan.base_named("7:3x64x96")


def model_terms(found):
    return [found.terms.get(name, 0) for name in ("frozen weights", "trained parameters")]


BOFT = PeftConfig(kind="peft", config={"peft_type": "BOFT", "boft_block_size": 4}, **SOME)
"""It holds what is in no file."""


@pytest.mark.parametrize("adapter", [*EXAMPLES, *OTHERS, BOFT], ids=lambda x: x.kind)
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4-double", "fp8"])
def test_what_the_model_holds_is_exact(tmp_path, adapter, quantize):
    checkpoint.write(tmp_path / "base.pth", official("7", n_layer=3, n_embd=64, head_size=64, vocab_size=96))
    try:
        model = models.load(tmp_path / "base.pth", dtype=torch.float32, quantize=quantize)
        attach(model, adapter, 0)
    except InputError as refused:  # the plan refuses what training refuses
        with pytest.raises(InputError, match=re.escape(refused.rule)):
            plan.predict(plan.base_in(tmp_path / "base.pth"), settings(adapter, quantize), CARD)
        return
    found = plan.predict(plan.base_in(tmp_path / "base.pth"), settings(adapter, quantize), CARD)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    every = sum(x.nbytes for x in all_tensors(model))
    assert model_terms(found) == [every - trained, trained]
    moments = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    moments.step()
    held = sum(x.nbytes for state in moments.state.values() for name, x in state.items() if name != "step")
    assert found.terms["optimizer moments"] == held


@pytest.mark.parametrize("kind", ["WAVEFT", "SHIRA"])
def test_what_has_no_plan_is_said(base, kind, capsys):
    adapter = PeftConfig(kind="peft", config={"peft_type": kind}, **SOME)
    with pytest.raises(plan.Unplanned, match=f"adapter.config.peft_type = {kind}: has no plan of its memory"):
        plan.predict(base, settings(adapter), CARD)
    assert plan.preflight(base, settings(adapter), CARD) is None
    assert f"peft_type = {kind}" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6", "7"])
def test_sizes_are_read_from_the_header(tmp_path, version):
    tensors = official(version)
    checkpoint.write(tmp_path / "base.pth", tensors)
    found = plan.predict(plan.base_in(tmp_path / "base.pth"), settings(FULL), CARD)
    assert found.parameters == found.trained == sum(x.numel() for x in tensors.values())
    assert 0 < found.terms["gradients"] <= 4.04 * found.parameters
    assert found.disk["merged model"] == 2 * found.parameters


def test_terms_add_up_and_are_of_the_device(base):
    here, card = (plan.predict(base, settings(), room) for room in (HERE, CARD))
    for found in (here, card):
        assert found.peak == sum(found.terms.values())
        assert min(found.terms.values()) > 0
    assert here.allocated == here.peak
    assert here.terms["process"] == HERE.process + plan.RUN
    assert card.allocated == card.peak - card.terms["GPU context"] - card.terms["GPU allocator"]


@pytest.mark.parametrize("room", [HERE, CARD], ids=lambda room: room.kind)
def test_more_of_anything_takes_more(base, room):
    peaks = [plan.predict(base, settings(micro_batch=rows), room).peak for rows in (1, 4, 16)]
    assert peaks == sorted(set(peaks))
    peaks = [plan.predict(base, settings(ctx_len=tokens), room).peak for tokens in (32, 256, 1024)]
    assert peaks == sorted(set(peaks))
    longer = plan.base_named("7:6x64x96")
    assert plan.predict(longer, settings(), room).peak > plan.predict(base, settings(), room).peak


def test_shorter_rows_than_ctx_len_take_less(base):
    whole, short = (plan.Settings(**vars(settings()) | {"row": row}) for row in (None, 16))
    assert plan.predict(base, short, CARD).peak < plan.predict(base, whole, CARD).peak


def test_segments_and_blocks_made_again_take_less(base):
    given = settings(ctx_len=512)
    whole, parts, again, both = (
        plan.predict(base, given.spared(segment=segment, grad_cp=grad_cp), CARD).terms
        for grad_cp in (False, True)
        for segment in (None, 64)
    )
    assert parts["kept for the backward"] < whole["kept for the backward"] / 6
    state = sum(x.numel() for x in base.version(base.shape).initial_state(1)[0])
    assert parts["states between segments"] == 4 * state * 3 * 2 * 7  # three layers, two rows, seven borders
    assert again["kept for the backward"] < whole["kept for the backward"] / 2
    assert both["kept for the backward"] < again["kept for the backward"]


def test_what_does_not_fit_is_refused_with_what_does(base, capsys):
    wanted = settings(micro_batch=8, ctx_len=512)
    least = plan.predict(base, settings(micro_batch=2, ctx_len=512, accumulate=4), CARD).peak
    room = plan.Room("cuda", least, 0)
    assert not plan.predict(base, wanted, room).fits
    with pytest.raises(
        InputError, match=r"a peak of .*: there are .* of GPU memory; .*micro_batch: 2, .*accumulate: 4"
    ):
        plan.preflight(base, wanted, room)
    warned = plan.Settings(**vars(wanted) | {"train": wanted.train.model_copy(update={"memory": "warn"})})
    assert not plan.preflight(base, warned, room).fits
    assert "the run goes on" in capsys.readouterr().out
    assert plan.preflight(base, wanted, CARD).fits


def test_solve_keeps_the_step(base):
    wanted = settings(micro_batch=6, accumulate=2, ctx_len=256)
    peaks = {n: plan.predict(base, settings(micro_batch=n, accumulate=12 // n, ctx_len=256), CARD).peak for n in (3, 4)}
    found = plan.solve(base, wanted, plan.Room("cuda", peaks[3], 0))
    assert found is not None
    assert (found[0].train.micro_batch, found[0].train.accumulate) == (3, 4)  # 5 does not divide the step's 12 rows
    assert found[1].fits
    assert plan.changes(wanted, found[0]) == {"train.micro_batch": 3, "train.accumulate": 4}


def test_solve_packs_and_cuts_only_where_it_must(base):
    wide = plan.base_named("7:2x512x96")
    wanted = settings(micro_batch=1)
    peak = plan.predict(wide, wanted.spared(segment=None, grad_cp=True), CARD).peak
    form, found = (lambda pair: (pair[0].model.quantize, pair[1]))(
        plan.solve(wide, wanted, plan.Room("cuda", peak - 1, 0))
    )
    assert (form, found.fits) == ("int8", True)
    long = settings(micro_batch=1, ctx_len=1024)
    room = plan.Room("cuda", plan.predict(base, long, CARD).peak - 1, 0)
    cut = plan.solve(base, long, room)
    assert cut is not None
    assert cut[0].train.context.segment == 512
    assert plan.changes(long, cut[0]) == {"train.context.segment": 512}
    assert plan.solve(wide, settings(FULL, micro_batch=1), plan.Room("cuda", 1 << 20, 0)) is None


def test_what_can_not_fit_is_found_out_soon(base, monkeypatch):
    """One plan for each way to pack and to make blocks again, whatever the segments and rows."""
    asked, predict = [], plan.predict
    monkeypatch.setattr(plan, "predict", lambda *given: asked.append(given) or predict(*given))
    assert plan.solve(base, settings(micro_batch=8, ctx_len=4096), plan.Room("cuda", 1 << 20, 0)) is None
    assert len(asked) == 2 * (1 + len(plan.PACKED))


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "strategy", ["fsdp", *(f"deepspeed_stage_{s}" for s in ("1", "2", "2_offload", "3", "3_offload"))]
)
def test_a_process_has_its_share(base, adapter, strategy):
    """Bytes of parameters, gradients and the optimizer, as the table in docs/several-devices.md has them."""
    alone = plan.predict(base, settings(adapter), CARD).terms
    shared = {"parallel": {"strategy": strategy, "devices": 4, "nodes": 1, "bucket_mb": 3}}
    found = plan.predict(base, replace(settings(adapter, **shared), world=4), CARD).terms
    stage, offload = 3 if strategy == "fsdp" else int(strategy.split("_")[2]), strategy.endswith("offload")

    def share(size, since):
        return size if stage < since else 0 if offload else -(-size // 4)

    trained = alone["trained parameters"]
    assert found.get("optimizer moments", 0) == share(alone["optimizer moments"], 1)
    assert found.get("trained parameters", 0) == share(trained, 3)
    assert found.get("frozen weights", 0) == share(alone.get("frozen weights", 0), 3)
    assert found.get("kept for the backward") == alone["kept for the backward"]
    if strategy == "fsdp":
        assert 0 < found["gathered parameters"] < trained + alone.get("frozen weights", 0)
        assert "buckets" not in found
        return
    whole = alone["gradients"]
    assert found.get("gradients", 0) == share(whole, 1) + (whole if stage == 1 else 0)
    assert found.get("master weights", 0) == share(trained, 1)
    assert found["buckets"] == 2 * 3 << 20
    assert found.get("gathered parameters", 0) == (trained + alone.get("frozen weights", 0) if stage == 3 else 0)


def test_processes_on_one_machine_share_its_memory(base):
    shared = settings(parallel={"strategy": "ddp", "devices": 2, "nodes": 1, "bucket_mb": 25})
    peak = plan.predict(base, shared, HERE).peak
    one, two = (plan.predict(base, replace(shared, world=n), replace(HERE, bytes=peak)) for n in (1, 2))
    assert one.fits
    assert not two.fits
    assert plan.predict(base, replace(shared, world=2), plan.Room("cpu", 2 * peak, HERE.process)).fits


def test_a_shape_has_a_form():
    assert plan.base_named("4:24x1024x50277").shape.vocab_size == 50277
    for text in ("8:1x64", "7:32", "7:0x64", "7:2x100"):
        with pytest.raises(InputError, match="write it as 7:32x2560"):
            plan.base_named(text)


def test_speed_is_measured(base):
    assert plan.tokens_per_second(base, settings(), HERE) > 0
    assert isinstance(LORA, LoraConfig)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "muon"])
def test_what_an_optimizer_keeps(kind):
    """Against the state that it really has after a step."""
    wide, momentum = plan.base_named("7:1x128x96"), 0.95 if kind == "muon" else None
    given = settings(FULL, optimizer={"kind": kind, "momentum": momentum})
    found = plan.predict(wide, given, CARD).terms["optimizer moments"]
    model = wide.version(wide.shape)
    torch.nn.init.normal_(model.emb.weight)
    optimizer = build(groups(model, given.train.optimizer), given.train.optimizer)
    for p in model.parameters():
        torch.nn.init.normal_(p)
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [
        x for state in optimizer.state.values() for name, x in state.items() if name not in ("step", "qmap1", "qmap2")
    ]
    assert found == sum(x.nbytes for x in kept if isinstance(x, torch.Tensor))
