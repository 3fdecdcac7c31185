"""A run that was stopped, killed or out of room, and continued, leaves the bytes of one that was not."""

import json
import multiprocessing
import random
import runpy
import shutil
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch
from methods import EXAMPLES
from train_settings import train_settings

from rwkv_core import checkpoint, models
from rwkv_core.data.binidx import Writer
from rwkv_core.training.checkpoints import CheckpointFile, save

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
OUTPUTS = ("adapter.pth", "history.json", "kept.pth")


@pytest.fixture(scope="module")
def processes():
    """Starts processes in which torch and Lightning are loaded already; each is fresh otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rwkv_core.training.fit", "rwkv_core.models", "rwkv_core.adapters"])
    return context


@pytest.fixture
def start(processes, capfd):
    """Runs run.py, and returns its exit status, a negative signal number where one killed it."""

    def start(folder, settings=SETTINGS, method=None, **accident):
        arguments = {"folder": folder, "settings": settings, "accident": accident, "method": method}
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
        undisturbed.update(outputs(folder))
        clear(folder)
    return undisturbed


def outputs(folder):
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def clear(folder):
    """As if nothing had run yet."""
    for name in OUTPUTS:
        (folder / name).unlink()
    shutil.rmtree(folder / "run")


def there(folder):
    """All that lies in the run's folder, temporary names too."""
    return {path.name for path in (folder / "run").iterdir()}


def finish(start, folder, expected, settings=SETTINGS):
    assert start(folder, settings) == 0
    assert outputs(folder) == expected
    assert {name for name in there(folder) if not name.startswith(".")} == {
        "last.ckpt",
        "previous.ckpt",
        "train_log.txt",
    }
    log = [line.split() for line in (folder / "run" / "train_log.txt").read_text().splitlines() if line[0].isdigit()]
    assert [int(line[6]) for line in log] == [3, 6, 9, 12, 15], (
        "a line for each measurement, however often it was stopped"
    )
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
    assert there(folder) == {"last.ckpt", "train_log.txt"}
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
    expected = outputs(folder)
    steps = last(folder)
    clear(folder)
    for forward in (7, 9, 8):  # after step 3, after step 6, and after step 9
        assert start(folder, settings, at="forward", count=[forward], signals=[SIGKILL]) == -SIGKILL
    assert last(folder) == 9 < steps
    saved = torch.load(folder / "run" / "last.ckpt", weights_only=True)["lanes"]
    assert [x.shape[0] for block in saved for x in block] == [4] * 6
    assert all(x.dtype == torch.float32 and x.any() for block in saved for x in block)
    assert start(folder, settings) == 0
    assert outputs(folder) == expected
    assert int((folder / "resumed_at").read_text()) == 9


SAVES = {"every": 2, "every_epochs": 0.5, "keep_last": 3, "keep_best": 2, "result": "best"}
PLACES = {"forward": FORWARDS, "validate": 18, "save": 8, "keep": 12}
"""Where a kill test kills, and how often a run comes by at the least."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"),
    [(EXAMPLES[0], 8), (EXAMPLES[2], 8), (EXAMPLES[5], 7), (EXAMPLES[6], 7)],
    ids=lambda x: getattr(x, "kind", x),
)
def test_kills_at_thirty_instants(method, kills, folder, start):
    """Inside steps, validations, checkpoints and saved adapters: what is left is that of the run that nobody killed."""
    settings = SETTINGS | {"rows": "pad", "ctx_len": 16, "checkpoint_every": 2, "validate_every": 2, "saves": SAVES}
    assert start(folder, settings, method) == 0
    expected = outputs(folder)
    kept = torch.load(folder / "kept.pth", weights_only=True)[0]
    assert len(set(kept.values())) == len(kept) >= 3
    clear(folder)
    draw = random.Random(method.kind)
    died = 0
    while died < kills:
        at = draw.choice(list(PLACES))
        # of a run that was killed before, less is left; one that comes through begins anew
        if start(folder, settings, method, at=at, count=[draw.randrange(1, PLACES[at] // 2)], signals=[SIGKILL]) == 0:
            assert outputs(folder) == expected
            clear(folder)
        else:
            died += 1
    assert start(folder, settings, method) == 0
    assert outputs(folder) == expected


def test_a_run_goes_on_from_the_checkpoint_before_a_corrupted_one(expected, folder, start):
    assert start(folder, at="forward", count=[29], signals=[SIGKILL]) == -SIGKILL
    assert last(folder) == 8
    data = bytearray((folder / "run" / "last.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "run" / "last.ckpt").write_bytes(data)
    assert start(folder) == 0
    assert int((folder / "resumed_at").read_text()) == 4
    assert (folder / "run" / "last.ckpt.refused").read_bytes() == data
    assert outputs(folder) == expected


def test_a_run_whose_checkpoints_are_all_corrupted_begins_anew(expected, folder, start):
    assert start(folder, at="forward", count=[29], signals=[SIGKILL]) == -SIGKILL
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / "run" / name).write_bytes(b"nothing")
    assert start(folder) == 0
    assert int((folder / "resumed_at").read_text()) == 0
    assert outputs(folder) == expected


def test_a_checkpoint_of_other_settings_is_refused(expected, folder, start):
    assert start(folder, at="forward", count=[20], signals=[SIGTERM]) == 3
    (folder / "run").rename(folder / "of other settings")
    (folder / "run").mkdir()
    (folder / "of other settings" / "last.ckpt").rename(folder / "run" / "last.ckpt")
    data = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    assert (data["digest"], data["run"]) == ("run", "its id")
    (folder / "run").rename(folder / "another")
    (folder / "another").rename(folder / "run")
    save(folder / "run", lambda path: CheckpointFile().save_checkpoint(data | {"digest": "another"}, path))
    assert start(folder) == 3
    assert (
        (folder / "message")
        .read_text()
        .startswith(f"InputError: {folder / 'run' / 'last.ckpt'}: is of the run another")
    )
    assert not (folder / "adapter.pth").exists()


@pytest.mark.parametrize("wrong", [-10 * 86400, 10 * 86400], ids=["back", "ahead"])
def test_a_clock_that_jumps_changes_nothing(wrong, expected, folder, start):
    assert start(folder, at="forward", count=[14], signals=[SIGKILL]) == -SIGKILL
    assert start(folder, at="forward", count=[10], signals=[SIGKILL], clock=wrong) == -SIGKILL
    assert finish(start, folder, expected) == 4


def test_what_is_kept_is_what_was_learned_then(folder, start):
    """The adapter of each kept step is that of a run of the same course which a signal stopped there."""
    settings = SETTINGS | {"saves": SAVES, "validate_every": 2}
    assert start(folder, settings) == 0
    kept, step, best = torch.load(folder / "kept.pth", weights_only=True)
    history = json.loads((folder / "history.json").read_text())[0]["valid"]
    losses = {int(s): row["loss"] for s, row in history.items() if s != "0"}
    first, second = sorted(losses, key=lambda s: (losses[s], s))[:2]
    assert (
        {f"rwkv-{s}.pth" for s in (12, 14, 15, first, second)}
        >= set(kept)
        >= {f"rwkv-{s}.pth" for s in (14, 15, first)}
    )
    assert step == first
    assert best == (None if first == STEPS else kept[f"rwkv-{first}.pth"])
    assert kept["rwkv-15.pth"] == (folder / "adapter.pth").read_bytes()
    clear(folder)
    assert start(folder, settings, at="forward", count=[41], signals=[SIGTERM]) == 3
    saved = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 14
    (folder / "14.pth").write_bytes(kept["rwkv-14.pth"])
    learned = {name.removeprefix("model."): x for name, x in saved["state_dict"].items()}
    there = torch.load(folder / "14.pth", weights_only=True)
    assert learned.keys() == there.keys()
    assert all(torch.equal(learned[name], x) for name, x in there.items())


@pytest.mark.parametrize("space", [0, 2000])
def test_a_full_disk_while_an_adapter_is_kept(space, folder, start):
    settings = SETTINGS | {"saves": SAVES, "validate_every": 5}
    assert start(folder, settings) == 0
    expected = outputs(folder)
    clear(folder)
    assert start(folder, settings, at="forward", count=[13], space=space) == 3  # in step 5, which is one to keep
    assert (folder / "message").read_text().endswith("free some space and run again")
    assert not [path for path in (folder / "run/saves").iterdir() if path.name.startswith(".")]
    assert start(folder, settings) == 0
    assert outputs(folder) == expected
    assert int((folder / "resumed_at").read_text()) == 4


@pytest.mark.slow
def test_kills_while_the_context_grows(folder, start):
    """The windows, and what dropout draws in each of their segments, are functions of the step."""
    grows = {"segment": 3, "initial_ctx_len": 2, "ctx_warmup_steps": 10}
    settings = SETTINGS | {"context": SETTINGS["context"] | grows}
    assert start(folder, settings) == 0
    expected = outputs(folder)
    assert expected["history.json"].count(b"ctx_len") == STEPS
    clear(folder)
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
    assert there(folder) == {"last.ckpt", "train_log.txt"}
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
