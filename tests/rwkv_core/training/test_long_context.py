"""Rows read segment by segment, in parts, in checkpointed blocks and in windows: against one graph, in float64."""

import itertools
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from documents import config, documents
from methods import EXAMPLES, OTHERS, PEFT, SOME
from pydantic import ValidationError
from random_models import VERSIONS, make
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from benchmarks import train_step
from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach
from rwkv_core.config import FullConfig, PeftConfig, StateConfig
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import Group, MicroBatches
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import Block
from rwkv_core.models.state import BlockState
from rwkv_core.training import context
from rwkv_core.training.module import Training
from rwkv_core.training.parallel import Ranks

SIZES = [31, 17, 9, 28, 12, 2, 16, 7, 33, 30]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]
MASKS = [[(7 * i + j) % 3 > 0 for j in range(size)] for i, size in enumerate(SIZES)]
NEW = {"state": "none", "load": None}
FULL = FullConfig(kind="full", layers="all", also=("*",), **NEW)
STATE = StateConfig(kind="state", state="wkv and token shift", layers="all", also=(), load=None)
LORA, *_ = EXAMPLES
DROPOUT = LORA.model_copy(update={"dropout": 0.3})
BOTH = LORA.model_copy(update={"state": "wkv"})
RESULT = {"rtol": 1e-9, "atol": 1e-13}
"""Of sums in another order, in float64."""


def adapted(version, adapter, *, dtype=torch.float64, op="reference", seed=0):
    """A small model, all that is trained of it random, and its states in float64 too."""
    model = make(version=version, n_layer=3, vocab_size=256, op=op, seed=seed)
    attach(model, adapter, seed=1)
    model.to(dtype).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator).to(p)
    if dtype == torch.float64:
        plain = model.initial_state
        model.initial_state = lambda batch: [BlockState(*(x.double() for x in block)) for block in plain(batch)]
    return model


def training(model, settings):
    return Training(model, [], settings, 10, 0)


def micro_batches(settings, *, after_state=False, weighted=True):
    data = documents(SIZES, masks=MASKS if weighted else None, weights=WEIGHTS if weighted else None)
    cut = rows(data, settings, 3, after_state=after_state)
    batches = MicroBatches(cut, settings.micro_batch, settings.accumulate, cut.before(1))
    return [batches[i] for i in range(len(batches))]


def gradients(model, loss):
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def found(model, settings, count=None, **how):
    """Loss and gradients of each micro-batch of an epoch, and the states that its lanes are left in."""
    module = training(model, settings)
    for i, batch in enumerate(micro_batches(settings, **how)[:count]):
        torch.manual_seed(i)
        loss = module.training_step(batch, i)
        yield loss.item(), gradients(model, loss), module._lanes.state


def same(ours, theirs, **tolerance):
    """Of two runs; and that there is something to compare."""
    several = 0
    for one, other in itertools.zip_longest(ours, theirs):
        assert one[0] == pytest.approx(other[0], rel=1e-6 if tolerance else 1e-10, abs=1e-12)
        assert one[1].keys() == other[1].keys()
        for name, x in other[1].items():
            torch.testing.assert_close(
                one[1][name], x, **(tolerance or RESULT), msg=lambda text, name=name: f"{name}: {text}"
            )
        several += sum(bool(x.abs().max() > 1e-6) for x in other[1].values())
        for x, y in zip(one[2] or [], other[2] or [], strict=True):
            for p, q in zip(x, y, strict=True):
                torch.testing.assert_close(p, q)
    assert several


def both(version, adapter, mode, *, ctx_len=31, segment=2, count=None, op="reference", **changes):
    """A run with segments, and one without."""
    mode, _, carried = mode.partition(", ")
    after_state = adapter.state != "none"
    runs = []
    for size in (segment, None):
        settings = config(mode, ctx_len, micro_batch=3, carry_state=bool(carried), context={"segment": size}, **changes)
        runs.append(found(adapted(version, adapter, op=op), settings, count, after_state=after_state))
    return runs


@pytest.mark.parametrize("version", VERSIONS)
def test_sixteen_segments_have_the_gradients_of_one_graph(version):
    """Of every parameter; rows of several lengths with masks and weights, the last segment shorter than the others."""
    same(*both(version, FULL, "pad", l2_wrap=1e-2, count=1))


@pytest.mark.parametrize(("version", "adapter"), [(v, a) for v in VERSIONS for a in EXAMPLES[:-1] + OTHERS[:1]])
def test_every_method_learns_the_same_in_segments(version, adapter):
    same(*both(version, adapter, "pad", ctx_len=12, segment=5, count=2))


@pytest.mark.parametrize("settings", PEFT, ids=lambda s: s["peft_type"])
def test_every_method_of_peft_learns_the_same_in_segments(settings):
    """Some of them compute in float32."""
    runs = both("7", PeftConfig(kind="peft", config=settings, **SOME), "pad", ctx_len=12, segment=5, count=1)
    same(*runs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("version", "adapter", "mode"),
    [
        *((v, a, "pad") for v in VERSIONS[1:] for a in (STATE, BOTH)),
        *(("7", a, "pad") for a in OTHERS[1:]),
        *((v, BOTH, m) for v in ("5.2", "7") for m in ("pack", "chunk, carried")),
    ],
)
def test_a_tuned_state_has_the_gradient_of_the_whole_row(version, adapter, mode):
    same(
        *both(version, adapter, mode, ctx_len=33 if mode == "pack" else 12, segment=5, count=1 if mode == "pack" else 2)
    )


@pytest.mark.parametrize("mode", ["stream", "pad", "pack", "pack, carried", "chunk", "chunk, carried", "magic_prime"])
@pytest.mark.parametrize("version", ["4", "7"])
def test_rows_of_every_kind(version, mode):
    """Groups of several lengths, states that lanes are left in and go on from, and micro-batches with nothing to read."""
    runs = [
        list(run) for run in both(version, BOTH if version == "7" and "chunk, c" in mode else LORA, mode, ctx_len=13)
    ]
    same(*runs)
    assert (runs[0][-1][2] is not None) is (mode == "chunk, carried")


def test_one_segment_is_a_row_in_one_graph():
    """To the bit, whatever the segment, and without a second pass."""
    losses = []
    for context_ in ({"segment": 32}, {}):
        settings = config("pad", 33, micro_batch=1, context=context_)
        short = [batch for batch in micro_batches(settings) if batch.groups[0].inputs.shape[1] <= 32]
        module = training(adapted("7", LORA, dtype=torch.float32, op="auto"), settings)
        losses.append([gradients(module.model, module.training_step(batch, 0)) for batch in short])
    assert len(losses[0]) >= 8
    assert all(torch.equal(x[name], y[name]) for x, y in zip(*losses, strict=True) for name in y)


def test_what_has_nothing_to_learn_has_zeros_as_in_one_graph():
    settings = config("pad", 31, micro_batch=1, context={"segment": 4})
    (batch,) = [b for b in micro_batches(settings) if not b.learned]
    assert batch.tokens == 12
    model = adapted("7", LORA)
    loss = training(model, settings).training_step(batch, 0)
    assert loss.item() == 0
    grads = gradients(model, loss)
    assert len(grads) == sum(p.requires_grad for p in model.parameters())
    assert not any(x.any() for x in grads.values())


def slope(model, module, batch, grads):
    """Along the gradient, by a difference of losses, over what the gradient says."""
    losses = []
    size = 1e-4 / sum(g.square().sum() for g in grads.values()).sqrt()
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in grads:
                    p += sign * size * grads[name]
            torch.manual_seed(5)
            losses.append(module.training_step(batch, 0).item())
            for name, p in model.named_parameters():
                if name in grads:
                    p -= sign * size * grads[name]
    return ((losses[0] - losses[1]) / (2 * size) / sum(g.square().sum() for g in grads.values())).item()


@pytest.mark.parametrize("context_", [{"segment": 4}, {"segment": 4, "grad_cp": True}, {"grad_cp": True}])
@pytest.mark.parametrize("version", ["4", "7"])
def test_dropout_is_the_same_in_both_passes(version, context_):
    """The gradient is the slope of the loss that was found, with what dropout left of the model."""
    settings = config("pad", 14, micro_batch=2, context=context_)
    batch = next(b for b in micro_batches(settings) if b.learned)
    model = adapted(version, DROPOUT)
    module = training(model, settings)
    found = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        loss = module.training_step(batch, 0)
        found.append((loss.item(), gradients(model, loss)))
    assert found[0][0] != found[1][0]
    with torch.enable_grad():
        assert slope(model, module, batch, found[0][1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("adapter", [FULL, BOTH], ids=["full", "lora and state"])
def test_hooks_fire_once_a_micro_batch(adapter):
    """Those of tensors and those of what is accumulated, as they do for one graph; nothing reaches what is frozen."""
    settings = config("pad", 31, micro_batch=2, context={"segment": 4})
    model = adapted("7", adapter)
    calls = {name: [0, 0] for name, p in model.named_parameters() if p.requires_grad}

    def count(name, which):
        def hook(_):
            calls[name][which] += 1

        return hook

    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(count(name, 0))
            p.register_post_accumulate_grad_hook(count(name, 1))
    module = training(model, settings)
    batches = micro_batches(settings, after_state=adapter.state != "none")[:2]
    for number, batch in enumerate(batches, 1):
        loss = module.training_step(batch, 0)
        loss.backward()
        assert {tuple(n) for n in calls.values()} == {(number, number)}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def cut_graph(model, batch, segment, k):
    """The definition of bptt = k, in one graph: the state is detached at every k-th border from the beginning."""
    total = 0.0
    for group in batch.groups:
        state = model.initial_state(len(group.inputs))
        for i, first in enumerate(range(0, group.inputs.shape[1], segment)):
            if i and i % k == 0:
                state = [BlockState(*(x.detach() for x in block)) for block in state]
            at = slice(first, first + segment)
            features, state = model.features(group.inputs[:, at], state)
            weights = torch.ones_like(features[..., 0]) if group.weights is None else group.weights[:, at]
            nll = torch.nn.functional.cross_entropy(
                model.head(features).flatten(0, 1), group.targets[:, at].flatten(), reduction="none"
            )
            total = total + (nll * weights.flatten()).sum()
    return total / batch.step_weight


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("version", "adapter"), [("4", FULL), ("6", LORA), ("7", BOTH)])
def test_truncated_gradients_are_those_of_the_definition(version, adapter, k):
    settings = config("pad", 31, micro_batch=2, context={"segment": 4, "bptt": k})
    batch = next(b for b in micro_batches(settings, after_state=adapter.state != "none") if b.learned)
    model = adapted(version, adapter)
    loss = training(model, settings).training_step(batch, 0)
    ours, theirs = gradients(model, loss), cut_graph(model, batch, 4, k)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)  # weights are float32
    want, exact = gradients(model, theirs), gradients(model, cut_graph(model, batch, 4, 99))
    assert ours.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-9)
    assert any((want[name] - exact[name]).abs().max() > 1e-5 for name in want)


def test_where_nothing_trained_is_within_reach_nothing_is_learned():
    """Of a state tuned alone, cut at the first border: the later segments have no gradient at all."""
    settings = config("pad", 31, micro_batch=2, context={"segment": 4, "bptt": 1})
    batch = next(b for b in micro_batches(settings, after_state=True) if b.learned)
    model = adapted("7", STATE)
    ours = gradients(model, training(model, settings).training_step(batch, 0))
    want = gradients(model, cut_graph(model, batch, 4, 1))
    assert ours.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "context_",
    [
        {"parts": 3}, {"grad_cp": True}, {"parts": 31, "grad_cp": True}, {"segment": 8, "parts": 3, "grad_cp": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", VERSIONS)
def test_parts_and_checkpointed_blocks_change_no_gradient(version, context_):
    runs = []
    for given in (context_, {}):
        settings = config("pad", 31, micro_batch=3, context=given)
        runs.append(found(adapted(version, FULL, op="torch"), settings, 2))
    same(*runs)


@pytest.mark.parametrize(
    ("version", "adapter", "context_", "op"),
    [  # every pair of two of these
        (
            version,
            (FULL, LORA)[(i + j) % 2],
            ({"segment": 8}, {"segment": 8, "parts": 2, "grad_cp": True})[(i // 2 + j) % 2],
            op,
        )
        for i, version in enumerate(VERSIONS)
        for j, op in enumerate(("auto", "torch"))
    ],
)
def test_in_bfloat16(version, adapter, context_, op):
    """Under autocast, which keeps casts of parameters, the gradients are as far from float32's as those of one graph are."""
    runs = []
    for given, mixed in ((context_, True), ({}, True), ({}, False)):
        settings = config("pad", 31, micro_batch=3, context=given)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            runs.append(list(found(adapted(version, adapter, dtype=torch.float32, op=op), settings, 1)))
    for ours, plain, exact in zip(*runs, strict=True):
        assert ours[0] == pytest.approx(plain[0], rel=2e-2)
        assert ours[1].keys() == plain[1].keys()
        errors = [torch.stack([(one[1][n] - x).norm() for n, x in exact[1].items()]).norm() for one in (ours, plain)]
        assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("adapter", [LORA, EXAMPLES[1], EXAMPLES[2]], ids=lambda a: a.kind)
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_beside_a_packed_base(form, adapter, tmp_path):
    checkpoint.write(tmp_path / "base.pth", make(vocab_size=256, n_embd=64, head_size=32).state_dict())
    runs = []
    for given in ({"segment": 8}, {"segment": 8, "grad_cp": True, "parts": 2}, {}):
        model = models.load(tmp_path / "base.pth", quantize=form)
        attach(model, adapter, seed=1)
        runs.append(list(found(model, config("pad", 31, micro_batch=3, context=given), 2)))
    same(runs[0], runs[2], rtol=1e-3, atol=1e-4)
    same(runs[1], runs[2], rtol=1e-3, atol=1e-4)


def test_checkpointed_blocks_keep_their_inputs_alone(monkeypatch):
    """Of a block: x, layer 0's value of all; nothing that its recurrence or its channel mix make."""
    monkeypatch.setattr(train_step, "VOCABULARY", 64)
    model = make(n_embd=128, head_size=64, n_layer=4)
    attach(model, train_step.lora(8, ["att.*", "ffn.*"]), seed=0)

    def kept():
        return sum(train_step.Step(model, 512).kept().values()) / (512 * 4 * 128 * 4)

    whole = kept()
    model.spare(parts=1, grad_cp=True)
    assert kept() < 1.8 < 10 < whole


def held_out(settings):
    module = training(adapted("7", LORA), settings)
    module.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    return module.held_out_loss(micro_batches(settings))


@pytest.mark.parametrize("mode", ["pad", "pack", "chunk, carried"])
def test_the_held_out_loss_is_the_same(mode):
    mode, _, carried = mode.partition(", ")
    losses = [
        held_out(config(mode, 31, micro_batch=3, carry_state=bool(carried), context={"segment": size}))
        for size in (4, None)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_the_context_grows_to_ctx_len_by_the_step_alone():
    """Floor(I + min(s / W, 1) (ctx_len - I)), at optimizer step s."""
    grows = config("stream", 20, context={"initial_ctx_len": 5, "ctx_warmup_steps": 4}).context
    assert [context.ctx_len_at(grows, 20, s) for s in (0, 1, 2, 3, 4, 5, 99)] == [5, 8, 12, 16, 20, 20, 20]
    assert context.ctx_len_at(config("stream", 20).context, 20, 0) == 20
    context.check(grows, 5)
    with pytest.raises(InputError, match="none would read rows of ctx_len"):
        context.check(grows, 4)


@pytest.mark.parametrize("mode", ["stream", "pad", "pack", "chunk"])
def test_a_growing_context_reads_all_tokens_in_windows_from_nothing(mode):
    """The loss of each micro-batch is that of its windows, each in a graph of its own."""
    settings = config(mode, 13, micro_batch=2, accumulate=2, context={"initial_ctx_len": 3, "ctx_warmup_steps": 2})
    model = adapted("7", LORA)
    module = training(model, settings)
    lengths = set()
    for i, batch in enumerate(micro_batches(settings)):
        size, want = context.ctx_len_at(settings.context, 13, i // 2), 0.0
        lengths.add(size)
        for group in batch.groups:
            weights = torch.ones(group.inputs.shape) if group.weights is None else group.weights
            for parts in zip(*(x.split(size, 1) for x in (group.inputs, group.targets, weights)), strict=True):
                part = batch._replace(groups=(Group(*parts, None, None),))
                want += cut_graph(model, part, size, 1).item() if batch.learned else 0
        assert module.training_step(batch, i).item() == pytest.approx(want * 2, rel=1e-6, abs=1e-12)
    assert lengths >= {3, 8, 13}


def test_a_growing_context_in_segments():
    grows = {"initial_ctx_len": 7, "ctx_warmup_steps": 2}
    runs = []
    for size in (4, None):
        settings = config("stream", 31, micro_batch=2, context=grows | {"segment": size})
        runs.append(found(adapted("6", LORA), settings))
    same(*runs)


def one_rank(rank, folder):
    """A step of a process, one of two: what DDP leaves as the gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    settings = config("pad", 31, micro_batch=2, context={"segment": 4})
    cut = rows(documents(SIZES, masks=MASKS, weights=WEIGHTS), settings, 3, world=2)
    module = training(adapted("7", LORA), settings)
    module.forward = lambda batch: module.training_step(batch, 0)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    parallel(MicroBatches(cut, 2, 1, 8, rank=rank, world=2)[0]).backward()
    torch.save({name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}, folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def in_two_processes(work, folder, *given):
    """What each of them leaves in the folder."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank, folder, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """DDP hears of each parameter once, and sums what both have; it divides by their number."""
    ours = in_two_processes(one_rank, tmp_path)
    settings = config("pad", 31, micro_batch=4)
    batch = micro_batches(settings)[0]
    model = adapted("7", LORA)
    want = gradients(model, training(model, settings).training_step(batch, 0))
    assert ours[0].keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(2 * ours[0][name], x, **RESULT)
        assert torch.equal(ours[0][name], ours[1][name])


class Shared:
    """A model's passes where processes share its parameters."""

    def __init__(self, module):
        self.forward = FullyShardedDataParallel(
            module,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )

    def backward(self, loss):
        (3 * loss).backward()  # a strategy may scale it


def one_share(rank, folder, adapter, context_):
    """A micro-batch of a process, one of two: what FSDP leaves as the gradients; and how many segments it has."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    settings = config("pad", 31, micro_batch=2, context=context_)
    cut = rows(documents(SIZES, masks=MASKS, weights=WEIGHTS), settings, 3, world=2)
    model = adapted("7", adapter)
    module = training(model, settings)
    batch = MicroBatches(cut, 2, 1, 8, rank=rank, world=2)[0]
    passes, c = Shared(module), settings.context
    sweep = context.SharedSweep(
        model, module._head_loss, c.segment, c.bptt, scale=1 / batch.step_weight, passes=passes, here=Ranks(rank, 2)
    )
    module._sweep(batch.groups, sweep)
    with FullyShardedDataParallel.summon_full_params(passes.forward, with_grads=True, writeback=False):
        named = ((name.replace("_fsdp_wrapped_module.", ""), p) for name, p in model.named_parameters())
        found = {name: p.grad.clone() for name, p in named if p.requires_grad}
    (group,) = batch.groups
    told = sweep.total().item() / batch.step_weight, len(context.segments(group, c.segment))
    torch.save((found, told), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("adapter", "context_"),
    [(FULL, {"segment": 4}), (LORA, {"segment": 4, "bptt": 3}), (LORA, {"segment": 5, "grad_cp": True, "parts": 2})],
)
def test_two_processes_with_a_share_each_have_the_gradient_of_one(adapter, context_, tmp_path):
    """Of every parameter, where one of them has half as many segments as the other."""
    ours = in_two_processes(one_share, tmp_path, adapter, context_)
    gradients_, told = zip(*ours, strict=True)
    assert len({count for _, count in told}) == 2
    cut = context_ if "bptt" in context_ else {}
    settings = config("pad", 31, micro_batch=4, context=cut)
    batch = micro_batches(settings)[0]
    model = adapted("7", adapter)
    loss = training(model, settings).training_step(batch, 0)
    assert sum(loss for loss, _ in told) == pytest.approx(loss.item(), rel=1e-6)
    want = gradients(model, loss)
    for found in gradients_:
        assert found.keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(found[name] * 2 / 3, x, **RESULT)


def peak(tokens, **given):
    """MB that a row of a small model takes, in a process of its own."""
    code = f"""if True:
        import torch
        from benchmarks import long_context
        from rwkv_core import memory
        from rwkv_core.training.callbacks import peak_memory_mb
        long_context.VOCABULARY = 256
        torch.set_num_threads(1)
        with memory.reused():
            long_context.Row(long_context.make(2, 64), {tokens}, **{given})()
            print(peak_memory_mb())"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_is_flat_in_the_length_of_the_row():
    """From 8 to 64 segments it grows by the states at the borders, 4 MB, and little else; one graph by far more."""
    few, many, whole = peak(8 * 512, segment=512), peak(64 * 512, segment=512), peak(64 * 512)
    assert many - few < 50
    assert whole - many > 2 * (many - few)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_border_keeps_no_more_than_its_state(version):
    """By plain torch the last token's is a view of all tokens."""
    model = make(version=version, op="torch")
    with torch.no_grad():
        _, state = model.features(torch.randint(0, 64, (2, 20)))
    views = [x for block in state for x in block if x.untyped_storage().nbytes() != x.nbytes]
    assert views
    for x, y in zip(*([x for block in s for x in block] for s in (state, context._detached(state))), strict=True):
        assert torch.equal(x, y)
        assert y.untyped_storage().nbytes() == y.nbytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": {"bptt": 2}}, "without segment there are none"),
        ({"context": {"segment": 16}}, "no effect on rows of ctx_len = 16"),
        ({"context": {"segment": 4, "bptt": 4}}, "are all of a row of 16"),
        ({"context": {"parts": 17}}, "more than the 16 tokens"),
        ({"context": {"segment": 4, "parts": 5}}, "more than the 4 tokens"),
        ({"context": {"initial_ctx_len": 4}}, "a warm-up of the context has both"),
        ({"context": {"ctx_warmup_steps": 4}}, "a warm-up of the context has both"),
        ({"context": {"initial_ctx_len": 16, "ctx_warmup_steps": 4}}, "must be below ctx_len = 16"),
        (
            {"context": {"initial_ctx_len": 4, "ctx_warmup_steps": 4}, "rows": "chunk", "carry_state": True},
            "carry_state reads on",
        ),
    ],
)
def test_what_has_no_effect_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        config(**{"rows": "stream", "ctx_len": 16} | given)


def test_a_growing_context_is_not_for_a_tuned_state():
    settings = config("pad", 16, context={"initial_ctx_len": 4, "ctx_warmup_steps": 4})
    settings.check_rows(after_state=False)
    with pytest.raises(InputError, match=r"initial_ctx_len = 4: adapter\.state stands at a document's beginning"):
        settings.check_rows(after_state=True)
