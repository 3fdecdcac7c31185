"""What harms a run is found, kept, left out; and all else is as if it had never been there."""

import json
import math
import subprocess
import sys

import pytest
import torch
from guarded import BAD, LORA, Stop, bits, equal, lay, losses, settings, train, write
from methods import EXAMPLES

from rwkv_core.config import FullConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import MicroBatches
from rwkv_core.errors import InputError, WorldError
from rwkv_core.training import guards as module
from rwkv_core.training import reproduce
from rwkv_core.training.guards import Incident, robust_z


@pytest.fixture
def place(tmp_path):
    lay(tmp_path)
    return tmp_path


def documents_of(place, config, numbers):
    cut = rows(Documents(place / "train"), config, 5)
    return {document for n in numbers for reading in cut.row(n) for document, _, _ in reading.pieces}


QUARANTINE = {"not_finite": "quarantine"}


@pytest.mark.parametrize(
    "change",
    [{}, *(pytest.param({"micro_batch": n, "accumulate": 4 // n}, marks=pytest.mark.slow) for n in (4, 1))],
    ids=str,
)
def test_a_planted_nan_is_left_out_and_the_others_keep_their_order(change, place, capsys):
    """As if the rows of its micro-batch had a weight of 0 from the start, and nothing had been wrong with the base."""
    config = settings(QUARANTINE, **change)
    _, result = train(place, config, base="base.pth")
    (incident,) = result.incidents
    assert (incident.what, incident.action) == ("not_finite", "quarantined")
    assert incident.values["loss"] == incident.values["grad_norm"] == "nan"
    out = incident.values["rows"]
    assert len(out) == config.micro_batch
    assert {n // 4 for n in out} == {incident.step - 1}
    left = documents_of(place, config, out)
    assert 17 in left
    write(place / "by_hand", planted={17}, zero=left)
    _, expected = train(place, config, data="by_hand", folder="by hand")
    assert expected.incidents == []
    assert losses(result) == pytest.approx(losses(expected), rel=1e-5)
    assert all(math.isfinite(x) for x in losses(result))
    counts = [[row["tokens"] for row in x.history["train"].values()] for x in (result, expected)]
    assert counts[0] == counts[1]
    assert f"step {incident.step}: not_finite" in capsys.readouterr().err
    _, disturbed = train(place, settings(**change), folder="without")  # the document does count
    assert losses(disturbed) != pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_on_the_way_ends_the_same(place):
    """Before the incident, on the way back, while the culprit is looked for, after it is found."""

    config = settings(QUARANTINE | {"blow_up": "warn", "blow_up_times": 1.01}, checkpoint_every=3)
    calls = []
    whole, result = train(place, config, base="base.pth", log=lambda step, metrics: calls.append(step))
    kept = (place / "run" / module.INCIDENTS).read_bytes()
    assert {x.action for x in result.incidents} == {"warned", "quarantined"}
    assert len(calls) > calls[-1] + len(result.history["valid"]), "it has gone back"
    for at in range(1, len(calls), 3):
        folder, seen = f"run {at}", []

        def stop(step, metrics, seen=seen, at=at):
            seen.append(step)
            if len(seen) == at:
                raise Stop

        with pytest.raises(Stop):
            train(place, config, base="base.pth", folder=folder, log=stop)
        again, other = train(place, config, base="base.pth", folder=folder)
        assert equal(bits(again), bits(whole)), at
        assert other.history == result.history, at
        assert (place / folder / module.INCIDENTS).read_bytes() == kept, at


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_the_reproducer_ends_the_same(place, monkeypatch):
    config, real = settings(QUARANTINE), reproduce.keep
    whole, _ = train(place, config, base="base.pth")

    def keep(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "keep", keep)
    with pytest.raises(BaseException):  # noqa: B017, PT011 -- Lightning makes another of it
        train(place, config, base="base.pth", folder="killed")
    monkeypatch.setattr(reproduce, "keep", real)
    assert not (place / "killed" / module.INCIDENTS).exists()
    again, _ = train(place, config, base="base.pth", folder="killed")
    assert equal(bits(again), bits(whole))
    files = [
        {
            str(p.relative_to(place / folder)): p.read_bytes()
            for p in (place / folder / module.QUARANTINE).rglob("*.p*t*")
        }
        for folder in ("run", "killed")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2


SOUND = FullConfig(kind="full", layers="all", also=("att.*", "ffn.*"), state="none", load=None)
"""All that is trained must be finite before the step, so not the embedding."""


@pytest.mark.parametrize(
    "adapter",
    [LORA, *(pytest.param(x, marks=pytest.mark.slow) for x in (*EXAMPLES[:-2], SOUND, EXAMPLES[-1]))],
    ids=lambda x: x.kind,
)
def test_the_reproducer_stands_alone(adapter, place):
    config = settings(QUARANTINE, steps=5 if adapter is not LORA else 14)
    write(place / "train", planted=range(0, 60, 6) if adapter is not LORA else {17})
    config = config.model_copy(update={"guards": config.guards.model_copy(update={"attempts": 99})})
    _, result = train(place, config, base="base.pth", adapter=adapter)
    found = [x for x in result.incidents if x.action == "quarantined"]
    assert found
    folder = place / "run" / found[0].values["kept"][0]
    with pytest.raises(InputError, match="is not the base that was trained on"):
        reproduce.reproduce(folder, place / "sound.pth")
    was, now, first = reproduce.reproduce(folder, place / "base.pth")
    assert math.isnan(now.loss)
    assert math.isnan(float(was["loss"]))
    assert first == "emb"
    if adapter is LORA:
        command = [sys.executable, "-m", "rwkv_core.training.reproduce", folder, "--base", place / "base.pth"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0] == "loss: nan, in the run nan"
        assert done.stdout.splitlines()[-2:] == ["not finite first: emb", "reproduced"]
        assert f"reproduce {folder} --base {place / 'base.pth'}" in (folder / "README.md").read_text()


def bad_rows(model):
    """Notes of each forward whether its rows have the bad token."""
    seen = {"bad": False, "calls": 0}

    def look(emb, inputs):
        seen["bad"] = bool((inputs[0] == BAD).any())
        seen["calls"] += model.training

    model.emb.register_forward_pre_hook(look)
    return seen


def louder(model):
    """The bad token makes all logits of its rows large, and with them the loss."""
    seen = bad_rows(model)
    model.ln_out.register_forward_hook(lambda ln, inputs, out: out * 40 if seen["bad"] and model.training else out)


def steeper(model):
    """The bad token makes the gradient large, and leaves the loss."""
    seen = bad_rows(model)

    def hook(ln, inputs, out):
        if seen["bad"] and model.training:
            out.register_hook(lambda gradient: gradient * 1e4)

    model.ln_out.register_forward_hook(hook)


def test_a_micro_batch_is_measured_by_itself(place):
    """Without what the step before has left: what was measured is what is measured again."""
    with pytest.raises(WorldError, match="attempts allows"):
        train(place, settings({"blow_up": "quarantine", "blow_up_times": 1.05, "window": 8, "attempts": 1}))
    incident = module.read(place / "run" / module.INCIDENTS)[0]
    kept = incident.values["kept"][0]
    assert kept == f"quarantine/{incident.step}-{2 * (incident.step - 1)}", "it is its step's first"
    was, now, _ = reproduce.reproduce(place / "run" / kept, place / "sound.pth")
    assert {name: float(x) for name, x in was.items()} == pytest.approx(now._asdict(), rel=1e-4)


@pytest.fixture
def late(place):
    """The bad token comes when there are steps to judge by."""
    config = settings(steps=14)
    cut = rows(Documents(place / "train"), config, 5)
    ((number, _, _),) = next(iter(cut.row(4 * 11 + 1))).pieces
    write(place / "train", planted={number})
    return number


@pytest.mark.parametrize(("what", "change"), [("spike", louder), ("blow_up", steeper)])
@pytest.mark.parametrize("answer", ["ignore", "warn", "stop", "quarantine"])
def test_what_is_out_of_line_is_answered(what, change, answer, place, late):
    others = {"spike": "ignore", "blow_up": "ignore"}
    config = settings({**others, what: answer, "spike_z": 12.0, "blow_up_times": 30.0})
    if answer == "stop":
        with pytest.raises(WorldError, match=rf"step 12: {what}, .* and |step 12: {what}, "):
            train(place, config, change=change)
        (incident,) = module.read(place / "run" / module.INCIDENTS)
        assert (incident.step, incident.what, incident.action) == (12, what, "stopped")
        return
    _, result = train(place, config, change=change)
    if answer == "ignore":
        assert result.incidents == []
        assert not (place / "run" / module.INCIDENTS).exists()
        return
    (incident,) = result.incidents
    assert (incident.step, incident.what) == (12, what)
    assert incident.action == {"warn": "warned", "quarantine": "quarantined"}[answer]
    if answer == "quarantine":
        left = documents_of(place, config, incident.values["rows"])
        assert late in left
        write(place / "by_hand", planted={late}, zero=left)
        _, expected = train(place, config, data="by_hand", folder="by hand")
        assert losses(result) == pytest.approx(losses(expected), rel=1e-5)


def test_a_fault_that_does_not_come_again_takes_nothing_out(place):
    """As of a device that failed once: the run goes back, and ends with the bytes of one that never failed."""
    failed = []

    def once(model):
        seen = bad_rows(model)

        def hook(ln, inputs, out):
            if seen["calls"] == 12 and not failed:
                failed.append(True)
                return out * math.nan
            return None

        model.ln_out.register_forward_hook(hook)

    config = settings(QUARANTINE)
    one, result = train(place, config, change=once)
    (incident,) = result.incidents
    assert (incident.step, incident.action) == (6, "went back")
    two, _ = train(place, config, folder="other")
    assert equal(bits(one), bits(two))


def test_a_fault_that_no_micro_batch_shows_by_itself_is_not_gone_back_from_for_ever(place):
    def in_steps(model):
        seen = bad_rows(model)

        def hook(
            ln, inputs, out
        ):  # call 12 is in step 6, whose two micro-batches are read alone at 15 and 16, and so on
            return out * math.nan if seen["calls"] in (12, 18, 24) else None

        model.ln_out.register_forward_hook(hook)

    with pytest.raises(WorldError, match=r"step 6: not_finite.* went back 2 times"):
        train(place, settings(QUARANTINE | {"attempts": 2}), change=in_steps)
    assert [x.action for x in module.read(place / "run" / module.INCIDENTS)] == ["went back", "went back", "stopped"]


@pytest.mark.slow
def test_attempts_are_bounded_and_more_of_them_go_on(place):
    write(place / "train", planted={3, 17, 29, 41, 55})
    few = settings(QUARANTINE | {"attempts": 2})
    with pytest.raises(WorldError, match=r"went back 2 times, as train.guards.attempts allows; more, and it goes on"):
        train(place, few, base="base.pth")
    incidents = module.read(place / "run" / module.INCIDENTS)
    assert incidents[-1].action == "stopped"
    assert sum(x.action == "quarantined" for x in incidents) == 2
    _, result = train(place, settings(QUARANTINE | {"attempts": 9}), base="base.pth")
    quarantined = [x for x in result.incidents if x.action == "quarantined"]
    assert {3, 17, 29, 41, 55} <= documents_of(place, few, [n for x in quarantined for n in x.values["rows"]])
    _, at_once = train(place, settings(QUARANTINE | {"attempts": 9}), base="base.pth", folder="at once")
    assert at_once.history == result.history


def test_what_is_trained_and_no_number_any_more_takes_nothing_out(place):
    """The learning rate, not a row, is at fault: it is said, in place of quarantining everything."""

    models_made = []

    def broken(step, metrics):
        if step == 5:
            with torch.no_grad():
                next(p for p in models_made[0].parameters() if p.requires_grad).fill_(math.nan)

    with pytest.raises(WorldError, match=r"step 6: .*trained not finite before the step"):
        train(place, settings(QUARANTINE, checkpoint_every=1), change=models_made.append, log=broken)
    assert not (place / "run" / module.QUARANTINE).exists()


MATRIX = "blocks.1.att.value"


def test_an_adapter_without_a_gradient_is_named(place):
    def cut_off(model):
        for p in model.get_submodule(MATRIX).parameters():
            if p.requires_grad:
                p.register_hook(torch.zeros_like)

    _, result = train(place, settings({"dead_adapter": "warn"}), change=cut_off)
    assert result.incidents == [Incident(2, "dead_adapter", "warned", {"matrices": [MATRIX]})]
    with pytest.raises(WorldError, match=rf"step 2: dead_adapter, matrices {MATRIX}: each adapted matrix learns"):
        train(place, settings({"dead_adapter": "stop"}), change=cut_off, folder="other")


def test_an_adapter_that_does_not_move_is_named(place):
    def groups(model):
        still = [p for p in model.get_submodule(MATRIX).parameters() if p.requires_grad]
        others = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in still)]
        return [{"params": others}, {"params": still, "lr": 0.0}]

    _, result = train(place, settings({"dead_adapter": "warn"}), groups=groups)
    assert result.incidents == [Incident(2, "dead_adapter", "warned", {"matrices": [MATRIX]})]


@pytest.mark.parametrize("adapter", EXAMPLES, ids=lambda x: x.kind)
def test_no_method_is_dead_from_its_first_steps_on(adapter, place):
    _, result = train(place, settings({"dead_adapter": "stop"}, steps=5), adapter=adapter)
    assert result.incidents == []


def no_room(model, most, after=0):
    """More than `most` rows at once do not fit, once so many forwards are done."""
    seen = bad_rows(model)

    def hook(emb, inputs):
        if model.training and len(inputs[0]) > most and seen["calls"] > after:
            torch.empty(2**60, dtype=torch.uint8)

    model.emb.register_forward_pre_hook(hook)


REPLAN = {"out_of_memory": "replan"}


def test_out_of_memory_splits_the_steps_and_keeps_their_rows(place):
    """At the first step: the run is that of the other split, to the bit."""
    one, result = train(
        place, settings(REPLAN, micro_batch=6, accumulate=1, steps=8), change=lambda model: no_room(model, 2)
    )
    assert [(x.what, x.action, x.values["micro_batch"], x.values["accumulate"]) for x in result.incidents] == [
        ("out_of_memory", "replanned", 3, 2),
        ("out_of_memory", "replanned", 1, 6),
    ]
    two, expected = train(place, settings(micro_batch=1, accumulate=6, steps=8), folder="other")
    assert equal(bits(one), bits(two))
    assert result.history["train"] == expected.history["train"]


@pytest.mark.parametrize("error", ["cpu", "cuda"])
@pytest.mark.slow
def test_out_of_memory_in_the_middle_goes_on_from_the_checkpoint(error, place):
    still = LORA.model_copy(update={"dropout": 0.0})  # drawn anew for another split

    def change(model):
        seen = bad_rows(model)

        def hook(emb, inputs):
            if model.training and len(inputs[0]) > 1 and seen["calls"] > 18:
                if error == "cuda":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                torch.empty(2**60, dtype=torch.uint8)

        model.emb.register_forward_pre_hook(hook)

    config = settings(REPLAN, optimizer={"eps": 1e-3})
    whole, result = train(place, config, change=change, adapter=still)
    (incident,) = result.incidents
    assert (incident.step, incident.action) == (10, "replanned")
    assert incident.values | {"error": 0} == {"error": 0, "was": 2, "micro_batch": 1, "accumulate": 4}
    _, expected = train(place, settings(optimizer={"eps": 1e-3}), folder="other", adapter=still)
    assert losses(result) == pytest.approx(losses(expected), rel=1e-4)
    assert [x["tokens"] for x in result.history["train"].values()] == [
        x["tokens"] for x in expected.history["train"].values()
    ]

    for at in (11, 13):  # both on the way from the checkpoint of step 8, and from that of step 12

        def stop(step, metrics, at=at):
            if step == at:
                raise Stop

        with pytest.raises(Stop):
            train(place, config, change=change, folder=f"run {at}", log=stop, adapter=still)
        again, _ = train(place, config, folder=f"run {at}", adapter=still)
        assert equal(bits(again), bits(whole))


def test_out_of_memory_that_nothing_helps_is_said(place):
    rule = r"step 1: .*: micro-batches of 1 rows of 24 tokens need more memory than there is; lower train.micro_batch"
    with pytest.raises(WorldError, match=rule):
        train(place, settings(REPLAN), change=lambda model: no_room(model, 0))
    assert [x.action for x in module.read(place / "run" / module.INCIDENTS)] == ["replanned", "stopped"]
    with pytest.raises(WorldError, match="micro-batches of 2 rows"):
        train(place, settings(), change=lambda model: no_room(model, 0), folder="other")


def test_other_errors_are_not_caught(place):
    def wrong(model):
        model.emb.register_forward_pre_hook(lambda *_: torch.empty(2) @ torch.empty(3))

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(place, settings(REPLAN | QUARANTINE), change=wrong)


ALL = {
    "not_finite": "quarantine", "spike": "warn", "spike_z": 1e9, "blow_up": "warn", "blow_up_times": 1e9,
    "dead_adapter": "warn", "out_of_memory": "replan",
}  # fmt: skip


@pytest.mark.parametrize("mode", [{}, {"rows": "chunk", "carry_state": True, "ctx_len": 4}], ids=str)
def test_guards_that_meet_nothing_change_nothing(mode, place):
    one, first = train(place, settings(**mode))
    two, second = train(place, settings(ALL, **mode), folder="other")
    assert equal(bits(one), bits(two))
    assert first.history == second.history
    assert second.incidents == []


@pytest.mark.slow
def test_a_row_whose_state_goes_on_is_left_out(place):
    """The reproducer has the state that the micro-batch is read after; its lanes go on from the state before it."""
    mode = {"rows": "chunk", "carry_state": True, "ctx_len": 4}
    write(place / "train", planted=range(0, 60, 2))
    _, result = train(place, settings(ALL | {"attempts": 99}, **mode), base="base.pth")
    assert all(math.isfinite(x) for x in losses(result))
    folder = place / "run" / result.incidents[0].values["kept"][0]
    kept = torch.load(folder / "micro_batch.pt", weights_only=True)
    assert kept["lanes"] is not None
    assert math.isnan(reproduce.reproduce(folder, place / "base.pth").now.loss)


def test_rows_that_are_left_out_move_no_other(place):
    config = settings()
    cut = rows(Documents(place / "train"), config, 5)
    whole = MicroBatches(cut, 3, 2, 50)
    some = MicroBatches(cut, 3, 2, 50, left_out=frozenset({1, 12, 13, 14}))
    for i in range(len(whole)):
        here = [n for n in whole.rows_of(i) if n not in (1, 12, 13, 14)]
        assert some.rows_of(i) == here
        if here == whole.rows_of(i):
            assert torch.equal(some[i].groups[0].inputs, whole[i].groups[0].inputs)
    assert some[4].groups == ()
    steps = [sum(some[i].learned for i in (2 * s, 2 * s + 1)) for s in range(3)]
    assert [some[2 * s].step_weight for s in range(3)] == steps


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_of_its_own(place):
    size = (place / "train.bin").stat().st_size

    def cut(step, metrics):
        if step == 5:
            with (place / "train.bin").open("r+b") as file:
                file.truncate(100)

    with pytest.raises(InputError, match=rf"train.bin: 100 bytes: it had {size} when it was opened"):
        train(place, settings(REPLAN), log=cut)


def test_robust_z_is_that_of_the_definition():
    assert robust_z(5.0, []) == 0
    others = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_z(10.0, others) == pytest.approx((10 - 3) / (1.4826 * 1))
    assert robust_z(1.0, others) < 0
    assert robust_z(2.2, [2.0] * 9) == pytest.approx(0.2 / 0.002)


def test_incidents_are_lines_of_json(place):
    incidents = [Incident(3, "spike", "warned", {"loss": 9.5}), Incident(4, "not_finite", "stopped", {"loss": "nan"})]
    module.write(place / "x.jsonl", incidents)
    assert module.read(place / "x.jsonl") == incidents
    assert [json.loads(line)["step"] for line in (place / "x.jsonl").read_text().splitlines()] == [3, 4]
    assert module.read(place / "none.jsonl") == []
