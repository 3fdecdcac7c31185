"""A run that was stopped, killed or out of room, and continued, leaves the bytes of one that was not."""

import multiprocessing
import random
import runpy
import shutil
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch
from train_settings import train_settings

from rwkv_core import checkpoint, models
from rwkv_core.data.binidx import Writer

SETTINGS = train_settings(
    micro_batch=2, accumulate=3, epochs=2.0, l2_wrap=1e-4, validate_every=3, validate_rows=4, checkpoint_every=4,
    optimizer={
        "lr": 0.02, "lr_final": 0.001, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01,
        "betas": (0.9, 0.99), "eps": 1e-18, "grad_clip": 0.5,
    },
)  # fmt: skip
FORWARDS = 43
STEPS = 15
SCRIPT = str(Path(__file__).with_name("run.py"))
OUTPUTS = ("adapter.pth", "history.json")


@pytest.fixture(scope="module")
def processes():
    """Starts processes in which torch and Lightning are loaded already; each is fresh otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rwkv_core.training.fit", "rwkv_core.models", "rwkv_core.adapters"])
    return context


@pytest.fixture
def start(processes, capfd):
    """Runs run.py, and returns its exit status, a negative signal number where one killed it."""

    def start(folder, settings=SETTINGS, **accident):
        arguments = {"folder": folder, "settings": settings, "accident": accident}
        process = processes.Process(target=runpy.run_path, args=(SCRIPT,), kwargs={"init_globals": arguments})
        process.start()
        process.join()
        assert process.exitcode in (0, 3, -SIGKILL), capfd.readouterr().err
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "data").mkdir()
    draw = random.Random(0)
    for side, count in (("train", 30), ("valid", 5)):
        writer = Writer(folder / "data" / side)
        for _ in range(count):
            first, size = draw.randrange(1, 30), draw.randrange(3, 18)
            writer.add([*range(first, first + size), 0])
        writer.close()
    return folder


@pytest.fixture
def folder(prepared, random_model, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data")
    checkpoint.write(tmp_path / "base.pth", random_model(n_layer=2, n_embd=16).state_dict())
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed():
    """The outputs of the run that nothing happened to, once it is there."""
    return {}


@pytest.fixture
def expected(undisturbed, folder, start):
    if not undisturbed:
        assert start(folder) == 0
        undisturbed.update({name: (folder / name).read_bytes() for name in OUTPUTS})
        for name in (*OUTPUTS, "run/last.ckpt"):
            (folder / name).unlink()
    return undisturbed


def finish(start, folder, expected, settings=SETTINGS):
    assert start(folder, settings) == 0
    assert {name: (folder / name).read_bytes() for name in OUTPUTS} == expected
    assert [path.name for path in (folder / "run").glob("[!.]*")] == ["last.ckpt"]
    return int((folder / "resumed_at").read_text())


def last(folder):
    return torch.load(folder / "run" / "last.ckpt", weights_only=True)["global_step"]


def test_a_run_is_what_it_is_meant_to_be(expected, folder, start):
    """That the numbers below hold, and that a second run has the same bytes."""
    assert finish(start, folder, expected) == 0
    assert last(folder) == STEPS
    assert expected["history.json"].count(b"grad_norm") == STEPS


@pytest.mark.parametrize("number", [SIGTERM, SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("forward", [5, 21], ids=["early", "late"])
def test_a_signal_saves_and_stops_between_steps(number, forward, expected, folder, start):
    """Both come in the middle of a step: 5 and 21 are the 2nd and the 3rd of three micro-batches."""
    assert start(folder, at="forward", count=[forward], signals=[number]) == 3
    step = -(-forward // 3)
    assert last(folder) == step
    message = (folder / "message").read_text()
    assert message == f"Interrupted: stopped and saved after step {step} of {STEPS}; run again to continue"
    assert not (folder / "adapter.pth").exists()
    assert finish(start, folder, expected) == step


def test_a_second_signal_stops_at_once(expected, folder, start):
    assert start(folder, at="forward", count=[14], signals=[SIGTERM, SIGINT]) == 3
    assert (folder / "message").read_text().startswith("Interrupted: stopped at once; run again and it continues from")
    assert last(folder) == 4
    assert finish(start, folder, expected) == 4


def test_a_second_signal_while_saving_leaves_the_checkpoint_before(expected, folder, start):
    """The second save is that of step 8. The first signal asks, the second interrupts the writing."""
    assert start(folder, at="save", count=[2], signals=[SIGTERM, SIGTERM]) == 3
    assert last(folder) == 4
    assert [path.name for path in (folder / "run").iterdir()] == ["last.ckpt"]
    assert finish(start, folder, expected) == 4


def test_kills_at_any_time(expected, folder, start):
    """One run, killed again and again, at random places."""
    draw = random.Random(7)
    done = 0
    while True:
        forward = draw.randrange(1, 20)
        if done * 3 + forward > FORWARDS:
            break
        assert start(folder, at="forward", count=[forward], signals=[SIGKILL]) == -SIGKILL
        done = last(folder) if (folder / "run" / "last.ckpt").exists() else 0
    assert finish(start, folder, expected) == done > 0


def test_kills_of_a_run_whose_states_go_on(folder, start):
    """Windows of a document in consecutive steps: the checkpoint has the states of their lanes."""
    settings = SETTINGS | {"rows": "chunk", "carry_state": True, "ctx_len": 4, "accumulate": 2, "checkpoint_every": 3}
    assert start(folder, settings) == 0
    expected = {name: (folder / name).read_bytes() for name in OUTPUTS}
    steps = last(folder)
    for name in (*OUTPUTS, "run/last.ckpt"):
        (folder / name).unlink()
    for forward in (7, 9, 8):  # after step 3, after step 6, and after step 9
        assert start(folder, settings, at="forward", count=[forward], signals=[SIGKILL]) == -SIGKILL
    assert last(folder) == 9 < steps
    saved = torch.load(folder / "run" / "last.ckpt", weights_only=True)["lanes"]
    assert [x.shape[0] for block in saved for x in block] == [4] * 6
    assert all(x.dtype == torch.float32 and x.any() for block in saved for x in block)
    assert start(folder, settings) == 0
    assert {name: (folder / name).read_bytes() for name in OUTPUTS} == expected
    assert int((folder / "resumed_at").read_text()) == 9


def test_kills_while_the_context_grows(folder, start):
    """The windows, and what dropout draws in each of their segments, are functions of the step."""
    grows = {"segment": 3, "initial_ctx_len": 2, "ctx_warmup_steps": 10}
    settings = SETTINGS | {"context": SETTINGS["context"] | grows}
    assert start(folder, settings) == 0
    expected = {name: (folder / name).read_bytes() for name in OUTPUTS}
    assert expected["history.json"].count(b"ctx_len") == STEPS
    for name in (*OUTPUTS, "run/last.ckpt"):
        (folder / name).unlink()
    for done, forward in ((4, 50), (8, 50)):
        assert start(folder, settings, at="forward", count=[forward], signals=[SIGKILL]) == -SIGKILL
        assert last(folder) == done
    assert finish(start, folder, expected, settings) == 8


def test_a_kill_while_saving_leaves_the_checkpoint_before(expected, folder, start):
    assert start(folder, at="save", count=[3], signals=[SIGKILL]) == -SIGKILL
    assert last(folder) == 8
    assert finish(start, folder, expected) == 8


def test_a_kill_after_the_last_step(expected, folder, start):
    """Nothing is left to learn: the adapter and the history are those of the checkpoint."""
    assert start(folder, at="end", count=[1], signals=[SIGKILL]) == -SIGKILL
    assert last(folder) == STEPS
    assert finish(start, folder, expected) == STEPS


def test_a_signal_in_the_last_step(expected, folder, start):
    assert start(folder, at="forward", count=[FORWARDS], signals=[SIGTERM]) == 3
    assert last(folder) == STEPS
    assert finish(start, folder, expected) == STEPS


@pytest.mark.parametrize("space", [0, 3000])
def test_a_full_disk_keeps_the_checkpoint_before(space, expected, folder, start):
    assert start(folder, at="forward", count=[20], space=space) == 3
    message = (folder / "message").read_text()
    assert last(folder) == 4
    assert [path.name for path in (folder / "run").iterdir()] == ["last.ckpt"]
    assert message.startswith("WorldError: ")
    assert message.endswith("the output needs more than that; free some space and run again")
    assert finish(start, folder, expected) == 4


def test_a_checkpoint_holds_nothing_frozen(expected, folder, start):
    assert start(folder, at="forward", count=[5], signals=[SIGTERM]) == 3
    state = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    adapted = [f"blocks.{i}.{name}" for i in range(2) for name in ("att.receptance", "ffn.key")]
    assert list(state["state_dict"]) == [f"model.{name}.{part}" for name in adapted for part in ("lora_A", "lora_B")]
    model = models.load(folder / "base.pth")
    assert (folder / "run" / "last.ckpt").stat().st_size < 4 * sum(p.numel() for p in model.parameters())
