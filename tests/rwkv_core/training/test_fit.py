import math

import numpy as np
import pytest
import stored
import torch
from methods import EXAMPLES
from train_settings import train_config

from kernels.head_loss import IGNORE
from rwkv_core.adapters import attach, trained_state
from rwkv_core.config import LoraConfig, StateConfig
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import MicroBatches, tokens_of
from rwkv_core.errors import InputError
from rwkv_core.formats.tuned_state import is_part
from rwkv_core.training.fit import fit
from rwkv_core.training.optimizers import groups

LORA = LoraConfig(
    kind="lora", rank=4, alpha=8, dropout=0.0, dora=False, rank_stabilized=False, targets=("att.*", "ffn.*"), layers="all",
    also=(), state="none", load=None,
)  # fmt: skip


def settings(optimizer=None, **changes):
    values = {
        "ctx_len": 16, "rows": "stream", "order": "shuffled", "carry_state": False, "mix": {}, "micro_batch": 2,
        "accumulate": 2, "epochs": 1.0, "steps": None, "tokens": None, "precision": "fp32", "l2_wrap": 1e-4,
        "validate_every": 5, "validate_rows": 6, "checkpoint_every": 10,
    }  # fmt: skip
    course = {
        "lr": 0.02, "lr_final": 0.002, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01,
        "betas": (0.9, 0.99), "eps": 1e-18, "grad_clip": 1.0,
    }  # fmt: skip
    return train_config(**(values | changes), optimizer=course | (optimizer or {}))


@pytest.fixture
def data(tmp_path):
    """Documents that count upwards from a random token: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    for side, count in (("train", 60), ("valid", 10)):
        writer = Writer(tmp_path / side)
        for _ in range(count):
            first, size = torch.randint(1, 40, (2,), generator=generator).tolist()
            writer.add([*range(first, min(first + size, 63)), 0])
        writer.close()
    return tmp_path


@pytest.fixture
def run(data, random_model, tmp_path_factory):
    """Trains a small model, adapted unless told otherwise, and returns it with the result."""

    def run(
        config, *, adapter=LORA, seed=11, order=5, folder=None, log=lambda step, metrics: None, dtype=None, op="auto",
        **sizes,
    ):  # fmt: skip
        model = random_model(n_layer=2, op=op, **sizes).to(dtype)
        after_state = adapter is not None and adapter.state != "none"
        if adapter is None:
            learned = groups(model, config.optimizer)
        else:
            attach(model, adapter, seed=3)
            learned = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.01}]
            if config.optimizer.rates:
                learned = groups(model, config.optimizer)
        result = fit(
            model,
            learned,
            rows(Documents(data / "train"), config, order, after_state=after_state),
            rows(Documents(data / "valid"), config, None, after_state=after_state),
            config,
            seed=seed,
            folder=folder or tmp_path_factory.mktemp("run"),
            log=log,
        )
        return model, result

    run.data = data
    return run


def read(rows, number):
    """Inputs and targets of a row that is read in one go."""
    (reading,) = rows.row(number)
    return tokens_of(rows.documents, reading)[:2]


def losses(result, of="train"):
    return [row["loss"] for _, row in sorted(result.history[of].items())]


def bits(model):
    return {name: x.clone() for name, x in trained_state(model).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_tokens_learn_as_the_whole_matrix_does(precision, run):
    def trained(*also):
        return run(settings(precision=precision, epochs=0.3), adapter=LORA.model_copy(update={"also": also}))

    whole, rows = trained("emb.weight", "head.weight"), trained("emb.weight[0-63]", "head.weight[all]")
    part = trained("emb.weight[1-3]", "head.weight[1-3]")
    off = 1e-5 if precision == "fp32" else 0.03
    for of in ("train", "valid"):
        want = losses(whole[1], of)
        assert losses(rows[1], of) == pytest.approx(want, rel=off)
        assert losses(part[1], of) != pytest.approx(want, rel=off)
    tokens = torch.arange(1, 20)[None]
    for model, _ in (rows, part):  # what is measured is what is there
        with torch.no_grad():
            got = model.head(model.features(tokens)[0])
            assert torch.equal(got, torch.nn.functional.linear(model.features(tokens)[0], model.head.now()))


def test_learns(run, data):
    seen = []
    model, result = run(settings(epochs=3.0), log=lambda step, metrics: seen.append((step, metrics)))
    steps = math.ceil(3 * math.ceil(Documents(data / "train").tokens / 16) / 4)
    assert (result.steps, result.resumed_at, result.tokens) == (steps, 0, 3 * Documents(data / "train").tokens)
    assert list(result.history["train"]) == list(range(1, steps + 1))
    assert list(result.history["valid"]) == sorted({*range(0, steps + 1, 5), steps})
    valid = losses(result, "valid")
    assert valid[0] > 3.5
    assert valid[-1] < 0.5 * valid[0]
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert result.tokens_per_second > 0
    assert model.training
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in result.history["train"].values())
    train = [(step, row) for step, row in seen if "train/loss" in row]
    assert [step for step, _ in train] == list(range(1, steps + 1))
    for step, row in train:
        assert {name: row[f"train/{name}"] for name in ("tokens", "loss", "lr", "grad_norm")} == result.history[
            "train"
        ][step]
        assert row["train/tokens_per_second"] > 0
        assert row["train/peak_memory_mb"] > 0
    assert [(step, row["valid/loss"]) for step, row in seen if "valid/loss" in row] == [
        (step, row["loss"]) for step, row in result.history["valid"].items()
    ]


def test_losses_are_those_of_the_plain_formula(run, data, random_model):
    """The first training loss and the first held-out loss, computed here from the logits."""
    _, result = run(settings())
    model = random_model(n_layer=2)

    def mean(cut, numbers):
        total = count = 0
        for number in numbers:
            inputs, targets = (torch.from_numpy(x)[None] for x in read(cut, number))
            with torch.no_grad():
                logits = model(inputs)[0][0].double()
            total += torch.nn.functional.cross_entropy(logits, targets[0], ignore_index=IGNORE, reduction="sum").item()
            count += (targets != IGNORE).sum().item()
        return total / count

    assert losses(result)[0] == pytest.approx(mean(rows(Documents(data / "train"), settings(), 5), range(4)), rel=1e-5)
    valid = rows(Documents(data / "valid"), settings(), None)
    assert losses(result, "valid")[0] == pytest.approx(mean(valid, range(6)), rel=1e-5)
    _, result = run(settings(validate_rows=1000))
    assert losses(result, "valid")[0] == pytest.approx(mean(valid, range(valid.before(1))), rel=1e-5)


def test_golden_losses(run, pytestconfig):
    """20 steps of an adapter, and what is held out."""
    assert torch.get_num_threads() == 1
    _, result = run(settings(epochs=80 / 82), adapter=LORA.model_copy(update={"dropout": 0.1}), op="torch")
    found = {"train": losses(result), "valid": losses(result, "valid")}
    assert [len(values) for values in found.values()] == [20, 5]
    stored.check("fit_losses", found, pytestconfig)


def test_equal_runs_have_equal_bits(run):
    config, lora = settings(), LORA.model_copy(update={"dropout": 0.2})
    (one, first), (two, second) = run(config, adapter=lora), run(config, adapter=lora)
    assert equal(bits(one), bits(two))
    assert first.history == second.history
    for other in ({"seed": 12}, {"order": 6}):
        _, third = run(config, adapter=lora, **other)
        assert third.history != first.history, other


def test_the_global_generator_does_not_matter(run):
    lora = LORA.model_copy(update={"dropout": 0.2})
    torch.manual_seed(1)
    _, first = run(settings(), adapter=lora)
    torch.manual_seed(2)
    _, second = run(settings(), adapter=lora)
    assert first.history == second.history


def test_accumulation_does_not_change_what_is_learned(run):
    """The last step is smaller than the others, and the last row has positions without a target.

    Adam's usual tiny eps makes a step of full length from a gradient that is rounding alone; here it does not.
    """
    runs = [run(settings({"eps": 1e-3}, micro_batch=m, accumulate=a)) for m, a in ((4, 1), (2, 2), (1, 4))]
    (whole, first), *others = runs
    for model, result in others:
        assert result.history["train"].keys() == first.history["train"].keys()
        for step, row in first.history["train"].items():
            assert result.history["train"][step] == pytest.approx(row, rel=1e-4), step
        for name, x in bits(whole).items():
            torch.testing.assert_close(bits(model)[name], x, rtol=1e-3, atol=1e-5)


def test_checkpointing_does_not_change_what_is_learned(run):
    (one, first), (two, second) = run(settings(checkpoint_every=1)), run(settings(checkpoint_every=10_000))
    assert equal(bits(one), bits(two))
    assert first.history == second.history


def test_validation_does_not_change_what_is_learned(run):
    lora = LORA.model_copy(update={"dropout": 0.2})
    one, first = run(settings(validate_every=1), adapter=lora)
    two, second = run(settings(validate_every=1000), adapter=lora)
    assert equal(bits(one), bits(two))
    assert first.history["train"] == second.history["train"]


def test_a_step_is_adamw(run):
    """One step of a run without warm-up or clipping, by hand: AdamW's first step is lr times the gradient's sign."""
    optimizer = {"warmup_steps": 0, "grad_clip": 0, "lr": 1e-3, "lr_final": 1e-3, "schedule": "constant"}
    config = settings(optimizer, epochs=0.01, micro_batch=1, accumulate=1, l2_wrap=0)
    model, result = run(config)
    assert result.steps == 1
    fresh, _ = run(settings(optimizer | {"lr": 1e-30, "lr_final": 1e-30}, epochs=0.01, micro_batch=1, accumulate=1))
    before, after = bits(fresh), bits(model)
    for name, x in after.items():
        if name.endswith("lora_B"):
            assert before[name].abs().max() < 1e-20
            torch.testing.assert_close(x.abs()[x != 0], torch.full_like(x, 1e-3)[x != 0])
            assert (x != 0).float().mean() > 0.5
        else:  # B is 0, so A has no gradient yet: weight decay alone
            torch.testing.assert_close(x, before[name] * (1 - 1e-3 * 0.01))


def test_rates_follow_the_schedule_and_the_groups(run):
    config = settings({"lr": 0.01, "lr_final": 0.001, "schedule": "linear", "warmup_steps": 4})
    _, result = run(config, adapter=None)
    rates = [row["lr"] for row in result.history["train"].values()]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[-1] == pytest.approx(0.001)
    # weights that only decay: tokens that never occur
    optimizer = {"lr": 0.01, "lr_final": 0.01, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.5}
    trained, result = run(settings(optimizer), adapter=None)
    start, _ = run(settings(optimizer | {"lr": 1e-30, "lr_final": 1e-30}), adapter=None)
    decayed = start.emb.weight[63] * (1 - 0.01 * 0.5) ** result.steps
    torch.testing.assert_close(trained.emb.weight[63], decayed)


def test_clipping(run):
    _, free = run(settings({"grad_clip": 0}))
    _, wide = run(settings({"grad_clip": 1e9}))
    _, tight = run(settings({"grad_clip": 1e-3}))
    assert free.history == wide.history
    assert free.history["train"][1] == tight.history["train"][1]
    assert free.history["train"][1]["grad_norm"] > 1e-3, "the norm is that before clipping"
    assert free.history != tight.history


def test_full_training(run, tmp_path):
    model, result = run(settings(epochs=3.0), adapter=None, folder=tmp_path)
    assert losses(result, "valid")[-1] < 0.5 * losses(result, "valid")[0]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"model.{name}" for name in model.state_dict()}
    assert all(torch.equal(saved[f"model.{name}"], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_bfloat16(dtype, run):
    """With the base in float32 and in bfloat16; what is trained is float32 in both."""
    model, result = run(settings(epochs=3.0, precision="bf16"), dtype=dtype)
    assert losses(result, "valid")[-1] < 0.5 * losses(result, "valid")[0]
    assert {x.dtype for x in bits(model).values()} == {torch.float32}
    _, full = run(settings(epochs=3.0))
    assert losses(result)[0] == pytest.approx(losses(full)[0], rel=0.02)
    assert losses(result) != losses(full)


def test_full_training_in_bfloat16(run):
    _, result = run(settings(epochs=3.0, precision="bf16"), adapter=None)
    assert losses(result, "valid")[-1] < 0.5 * losses(result, "valid")[0]


def scale(folder):
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return saved["MixedPrecision"]["scale"]


@pytest.mark.slow
def test_float16_scales_its_loss(run, tmp_path):
    """Two runs of it: with an adapter and without. The scale is in the checkpoint; the norms are of the gradient itself."""
    for adapter, folder in ((LORA, tmp_path / "lora"), (None, tmp_path / "full")):
        folder.mkdir()
        model, result = run(settings(epochs=3.0, precision="fp16"), adapter=adapter, folder=folder)
        _, full = run(settings(epochs=3.0), adapter=adapter)
        assert losses(result, "valid")[-1] < 0.5 * losses(result, "valid")[0]
        assert {x.dtype for x in bits(model).values()} == {torch.float32}
        assert losses(result)[0] == pytest.approx(losses(full)[0], rel=0.005)
        assert losses(result) != losses(full)
        first, second = (r.history["train"][1]["grad_norm"] for r in (result, full))
        assert first == pytest.approx(second, rel=0.02)
        assert scale(folder) == 2**16


def test_float16_skips_a_step_that_overflows(run, tmp_path):
    """A loss wrap so strong that the scaled gradient has no end: each time the scale is halved and nothing is learned."""
    start, _ = run(settings({"lr": 1e-30, "lr_final": 1e-30, "schedule": "constant"}, epochs=None, steps=3))
    model, result = run(settings(epochs=None, steps=3, precision="fp16", l2_wrap=1e30), folder=tmp_path)
    assert result.steps == 3
    assert scale(tmp_path) == 2**13
    assert all(not math.isfinite(row["grad_norm"]) for row in result.history["train"].values())
    for name, x in bits(start).items():
        torch.testing.assert_close(bits(model)[name], x)


def test_tf32_is_float32_where_no_gpu_rounds_its_products(run):
    _, one = run(settings())
    before = torch.get_float32_matmul_precision()
    _, other = run(settings(precision="tf32"))
    assert torch.get_float32_matmul_precision() == before
    if not torch.cuda.is_available():
        assert losses(one) == pytest.approx(losses(other), rel=1e-2)


KINDS = {
    "adamw_8bit": {}, "cpu_adam": {}, "muon": {"momentum": 0.95}, "adamw": {"rates": {"*.lora_B": 4}},
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "cpu_adam" else kind for kind in KINDS]
)
def test_every_optimizer_learns_and_continues_where_it_stopped(kind, precision, run, tmp_path):
    """Full training, so that there are matrices that 8 bits are for; wsd, whose place is the checkpoint's too."""

    def stop(step, metrics):
        if step == 13:
            raise Stop

    optimizer = {
        "kind": kind,
        **KINDS[kind],
        "schedule": "wsd",
        "decay": "40%",
        "decay_form": "sqrt",
        "warmup_from": 0.01,
    }
    adapter = LORA if kind == "adamw" else None
    config = settings(optimizer | {"lr": 0.01}, precision=precision)
    sizes = {"n_embd": 64, "head_size": 16}
    whole, first = run(config, adapter=adapter, **sizes)
    assert losses(first, "valid")[-1] < 0.9 * losses(first, "valid")[0]
    with pytest.raises(Stop):
        run(config, adapter=adapter, folder=tmp_path, log=stop, **sizes)
    continued, result = run(config, adapter=adapter, folder=tmp_path, **sizes)
    assert result.resumed_at == 10
    assert equal(bits(whole), bits(continued))
    assert result.history == first.history


def test_a_finished_run_is_taken_as_it_is(run, tmp_path, capsys):
    model, first = run(settings(), folder=tmp_path)
    before = (tmp_path / "last.ckpt").stat().st_mtime_ns
    capsys.readouterr()
    again, second = run(settings(), folder=tmp_path)
    assert equal(bits(again), bits(model))
    assert second.history == first.history
    assert (second.resumed_at, second.tokens_per_second) == (second.steps, 0)
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == before
    assert f"continuing after step {first.steps} ({tmp_path / 'last.ckpt'}" in capsys.readouterr().out


def test_a_warmup_longer_than_the_run_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"warmup_steps = 500: this run has \d+ optimizer steps"):
        run(settings({"warmup_steps": 500}), folder=tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


def test_it_is_told_on_one_line_now_and_then(run, capsys):
    run(settings())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 epochs = 21 steps = 1290 tokens, of which all are learned"
    assert lines[1].startswith("step 1/")
    assert "loss" in lines[-1]
    assert len(lines) < 6


class Stop(Exception):
    """What ends a run before its time."""


WITH_STATE = LORA.model_copy(update={"state": "wkv and token shift"})


@pytest.mark.parametrize("adapter", [*EXAMPLES, WITH_STATE], ids=lambda config: f"{config.kind}-{config.state}")
def test_every_method_continues_where_it_stopped(adapter, run, tmp_path):
    def stop(step, metrics):
        if step == 13:
            raise Stop

    config = settings() if adapter.state == "none" else settings(rows="pad")
    whole, _ = run(config, adapter=adapter)
    with pytest.raises(Stop):
        run(config, adapter=adapter, folder=tmp_path, log=stop)
    continued, result = run(config, adapter=adapter, folder=tmp_path)
    assert result.resumed_at == 10
    assert equal(bits(whole), bits(continued))


ROWS = {
    "pad": {"rows": "pad"},
    "pad, similar_lengths": {"rows": "pad", "order": "similar_lengths"},
    "only": {"rows": "only", "micro_batch": 1},
    "pack": {"rows": "pack"},
    "pack, carried": {"rows": "pack", "carry_state": True},
    "chunk": {"rows": "chunk", "ctx_len": 9},
    "chunk, carried": {"rows": "chunk", "carry_state": True, "ctx_len": 4},
    "magic_prime": {"rows": "magic_prime", "order": "as_given"},
    "stream, mixed": {"mix": {"all": "0.75x"}},
    "stream, long_first": {"order": "long_first"},
}


NOW = ("pad", "pack, carried", "chunk, carried")
"""Each learns and continues twice: these in every run of the tests, the others where there is time."""


@pytest.mark.parametrize("mode", [mode if mode in NOW else pytest.param(mode, marks=pytest.mark.slow) for mode in ROWS])
def test_every_kind_of_row_learns_and_continues_where_it_stopped(mode, run, tmp_path, monkeypatch):
    """With masks and weights: to the bit, and with the same numbers in the history."""

    def stop(step, metrics):
        if step == 13:
            raise Stop

    monkeypatch.setattr(Documents, "learned", lambda self, i: np.arange(len(self[i])) % 4 != i % 3)
    monkeypatch.setattr(Documents, "weight", lambda self, i: 0.5 + i % 2)
    config, lora = settings(**{"epochs": None, "steps": 25} | ROWS[mode]), LORA.model_copy(update={"dropout": 0.1})
    whole, first = run(config, adapter=lora)
    with pytest.raises(Stop):
        run(config, adapter=lora, folder=tmp_path, log=stop)
    continued, result = run(config, adapter=lora, folder=tmp_path)
    assert (result.resumed_at, result.steps) == (10, 25)
    assert equal(bits(whole), bits(continued))
    assert result.history == first.history
    cut = rows(Documents(run.data / "train"), config, 5)
    batches = MicroBatches(cut, config.micro_batch, config.accumulate, 25 * config.micro_batch * config.accumulate)
    learned = np.cumsum([batches[i].learned for i in range(len(batches))])[config.accumulate - 1 :: config.accumulate]
    assert [row["tokens"] for _, row in sorted(result.history["train"].items())] == learned.tolist()
    assert result.tokens == learned[-1]
    assert losses(result, "valid")[-1] < 0.9 * losses(result, "valid")[0]


def test_a_held_out_set_without_anything_to_learn_is_refused(run, monkeypatch):
    monkeypatch.setattr(Documents, "learned", lambda self, i: np.zeros(len(self[i]), bool))
    with pytest.raises(
        InputError, match=r"train.validate_rows = 6: the first held-out rows have no token that is learned"
    ):
        run(settings())


def test_how_long_it_is_is_said_in_every_unit(run, capsys, monkeypatch):
    run(settings(epochs=None, tokens=320))
    assert capsys.readouterr().out.splitlines()[0] == ("0.2469 epochs = 5 steps = 320 tokens, of which all are learned")
    monkeypatch.setattr(Documents, "learned", lambda self, i: np.arange(len(self[i])) > 0)
    _, result = run(settings(epochs=None, steps=5))
    assert result.steps == 5
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("0.2469 epochs = 5 steps = 320 tokens, of which about ")
    assert int(said.split()[-3]) == pytest.approx(result.tokens, rel=0.05)


STATE = StateConfig(kind="state", state="wkv", layers="all", also=(), load=None)


@pytest.mark.parametrize("adapter", [STATE, WITH_STATE, LORA], ids=lambda config: f"{config.kind}-{config.state}")
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_documents_as_rows_are_learned(adapter, precision, run, data):
    config = settings({"lr": 0.3 if adapter is STATE else 0.02}, rows="pad", epochs=4.0, precision=precision)
    model, result = run(config, adapter=adapter, dtype=torch.bfloat16 if precision == "bf16" else None)
    learned = rows(Documents(data / "train"), config, 5, after_state=adapter.state != "none")
    assert result.tokens == learned.tokens_before(4 * 60)
    assert losses(result, "valid")[-1] < (0.98 if adapter is STATE else 0.5) * losses(result, "valid")[0]
    state = {name: x for name, x in bits(model).items() if is_part(name)}
    assert len(state) == {"none": 0, "wkv": 2}.get(adapter.state, 6)
    assert all(x.dtype == torch.float32 and x.any() for x in state.values())


def test_losses_of_documents_are_those_of_the_plain_formula(run, data, random_model):
    """The first loss of a step cut into micro-batches of unequal rows; nothing is learned from what fills a row up."""
    _, result = run(settings(rows="pad"), adapter=STATE)
    model, cut = random_model(n_layer=2), rows(Documents(data / "train"), settings(rows="pad"), 5, after_state=True)
    total = count = 0
    for number in range(4):
        inputs, targets = (torch.from_numpy(x) for x in read(cut, number))
        with torch.no_grad():
            logits = model(inputs[None])[0][0].double()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    assert losses(result)[0] == pytest.approx(total / count, rel=1e-5)


def test_accumulation_of_documents_does_not_change_what_is_learned(run):
    runs = [
        run(settings({"eps": 1e-3}, rows="pad", micro_batch=m, accumulate=a), adapter=WITH_STATE)
        for m, a in ((4, 1), (1, 4))
    ]
    (whole, first), (cut, second) = runs
    for step, row in first.history["train"].items():
        assert second.history["train"][step] == pytest.approx(row, rel=1e-4), step
    for name, x in bits(whole).items():
        torch.testing.assert_close(bits(cut)[name], x, rtol=1e-3, atol=1e-5)
