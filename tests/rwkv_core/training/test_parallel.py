"""One number whatever the split: over micro-batches, and over processes, each strategy as it is."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import config, documents
from methods import EXAMPLES
from pytorch_lightning.strategies import FSDPStrategy
from random_models import VERSIONS, make
from train_settings import train_config, train_settings

from rwkv_core import checkpoint
from rwkv_core.config import ParallelConfig
from rwkv_core.data.binidx import Writer
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import MicroBatches
from rwkv_core.errors import InputError, WorldError
from rwkv_core.models.state import BlockState
from rwkv_core.training import parallel, reproduce
from rwkv_core.training.guards import Guards
from rwkv_core.training.module import Lanes, Training
from rwkv_core.training.parallel import Ranks

SPLITS = [(a, b, 12 // a // b) for a in (1, 2, 3, 4, 6, 12) for b in (1, 2, 3, 4, 6, 12) if 12 % (a * b) == 0]
"""micro_batch, accumulate, world of all ways to have a step of 12 rows."""

SIZES = [3, 17, 9, 5, 12, 2, 16, 7, 8, 4, 11, 6, 13]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 2.0]
MASKS = [[(7 * i + j) % 3 > 0 for j in range(size)] for i, size in enumerate(SIZES)]


def exact(version):
    model = make(version=version, n_layer=2, vocab_size=128, op="reference").double()
    plain = model.initial_state
    model.initial_state = lambda batch: [BlockState(*(x.double() for x in block)) for block in plain(batch)]
    return model


def first_step(model, data, settings, world):
    """Loss and gradients of step 0, from what each rank would contribute by itself; and those of the parts of the loss."""
    model.zero_grad()
    cut = rows(data, settings, 3, world=world)
    logged = 0.0
    for rank in range(world):
        here = Ranks(rank, world)
        module = Training(model, [], settings, 10, 0, here)
        batches = MicroBatches(cut, settings.micro_batch, settings.accumulate, cut.before(1), **here._asdict())
        for i in range(min(settings.accumulate, len(batches))):
            module.on_train_batch_start(batches[i], i)
            loss = module.training_step(batches[i], i)
            (
                loss / settings.accumulate / world
            ).backward()  # Lightning's mean over micro-batches, the strategy's over ranks
        logged += module.step_loss
    return logged, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["stream", "pad", "pack", "chunk, carried"])
def test_any_split_of_a_step_has_its_loss_and_gradients(mode, version):
    model, data = exact(version), documents(SIZES, masks=MASKS, weights=WEIGHTS)
    kind, _, carried = mode.partition(", ")
    found = []
    for micro_batch, accumulate, world in SPLITS if version == "7" else SPLITS[::4]:
        settings = config(
            kind, 17 if kind == "pack" else 6, micro_batch=micro_batch, accumulate=accumulate, carry_state=bool(carried),
            l2_wrap=1e-2,
        )  # fmt: skip
        found.append(first_step(model, data, settings, world))
    (loss, gradients), *others = found
    assert loss > 0
    assert gradients
    for other, theirs in others:
        assert other == pytest.approx(loss, rel=1e-6)  # logged as float32
        assert theirs.keys() == gradients.keys()
        for name, x in gradients.items():
            torch.testing.assert_close(
                theirs[name], x, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("world", [2, 3, 6])
def test_a_lane_stays_on_its_rank_and_all_states_are_saved(world):
    settings = config("chunk", 3, micro_batch=2, accumulate=1, carry_state=True)
    cut = rows(documents(SIZES), settings, 3, world=world)
    assert cut.lanes == 2 * world
    states, owner = [], {}
    for rank in range(world):
        lanes = Lanes()
        batches = MicroBatches(cut, 2, 1, cut.before(1), rank=rank, world=world)
        for i in range(len(batches)):
            for group in batches[i].groups:
                for lane in group.lanes.tolist():
                    assert owner.setdefault(lane, rank) == rank
                left = group.lanes[:, None] * 10.0 + rank
                lanes.keep(group, [BlockState(left, left[:, :, None], left)])
        states.append(lanes.state)

    class All(Ranks):
        def all(self, one):
            return states

    (block,) = Lanes().of_all(All(0, world))
    assert block.wkv.shape == (2 * world, 1, 1)
    assert block.att_shift[:, 0].tolist() == [10.0 * lane + lane % world for lane in range(2 * world)]


def test_rows_in_lanes_for_fewer_processes_are_refused(tmp_path):
    from rwkv_core.training.fit import fit

    settings = config("chunk", 3, micro_batch=1, accumulate=1, carry_state=True)
    cut = rows(documents(SIZES), settings, 3)
    with pytest.raises(InputError, match="in 1 lanes: 2 processes share them"):
        fit(make(), [], cut, cut, settings, seed=1, folder=tmp_path, log=print, here=Ranks(0, 2))


def shared(strategy, **changes):
    return train_config(parallel={"strategy": strategy, "devices": None, "nodes": 1, "bucket_mb": 25} | changes)


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (1, 2), (None, 2)])
def test_one_device_is_one(devices, nodes):
    with pytest.raises(ValueError, match="one_device is one process"):
        ParallelConfig(strategy="one_device", devices=devices, nodes=nodes, bucket_mb=1)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_understands_its_settings(stage, offload, monkeypatch):
    """By its own parser: what is not known there is an error, and what is not said is not assumed."""
    if stage == 1 and offload:
        pytest.skip("there is no such strategy")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    name = f"deepspeed_stage_{stage}{'_offload' if offload else ''}"
    settings = shared(name, bucket_mb=50).model_copy(update={"micro_batch": 3})
    given = parallel.deepspeed_config(settings)
    read = DeepSpeedConfig(given | {"gradient_accumulation_steps": 1})
    zero = read.zero_config
    assert zero.stage == stage
    assert zero.reduce_bucket_size == 50 * 2**20 // 4
    assert (zero.offload_optimizer is not None) == offload
    assert (zero.offload_param is not None) == (offload and stage == 3)
    assert read.gradient_clipping == settings.optimizer.grad_clip
    assert read.zero_allow_untested_optimizer
    assert read.zero_force_ds_cpu_optimizer is False
    assert read.train_micro_batch_size_per_gpu == 3
    half = parallel.deepspeed_config(settings.model_copy(update={"precision": "bf16"}))
    assert half["zero_optimization"]["reduce_bucket_size"] == 50 * 2**20 // 2
    made = parallel.strategy(settings)
    assert type(made).__name__ == "DeepSpeedStrategy"
    assert made.exclude_frozen_parameters
    assert made.zero_stage_3 == (stage == 3)


def test_each_strategy_is_lightnings():
    assert parallel.strategy(shared("one_device")) == "auto"
    assert type(parallel.strategy(shared("ddp"))).__name__ == "DDPStrategy"
    assert isinstance(parallel.strategy(shared("fsdp")), FSDPStrategy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")
def test_what_needs_a_card_is_refused_without():
    with pytest.raises(InputError, match=r"card; set ddp, fsdp or one_device"):
        parallel.ranks(shared("deepspeed_stage_2").parallel)
    assert parallel.ranks(shared("fsdp", devices=1).parallel) == (0, 1)


def test_processes_that_were_started_are_counted(monkeypatch):
    assert parallel.ranks(shared("ddp", devices=1).parallel) == (0, 1)
    with pytest.raises(InputError, match="several machines are started by torchrun or Slurm"):
        parallel.ranks(shared("ddp", nodes=2).parallel)
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "RANK": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    if not torch.cuda.is_available():
        assert parallel.ranks(shared("ddp", nodes=2).parallel) == (4, 6)
        with pytest.raises(InputError, match=r"devices = 2 and nodes = 2: 6 processes were started"):
            parallel.ranks(shared("ddp", devices=2, nodes=2).parallel)


def test_slurms_processes_are_counted(monkeypatch):
    for name, value in {
        "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    if not torch.cuda.is_available():
        assert parallel.ranks(shared("ddp", nodes=2).parallel) == (3, 4)
    assert parallel.environment().auto_requeue is False
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(InputError, match="srun --ntasks-per-node"):
        parallel.environment()


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_what_is_read_outside_its_block_is_not_cut_up(strategy):
    with pytest.raises(InputError, match="read outside the block"):
        parallel.check(shared(strategy), bridged=False, after_state=True, quantized=False)
    with pytest.raises(InputError, match=r"set it to none"):
        parallel.check(shared(strategy), bridged=False, after_state=False, quantized=True)
    with pytest.raises(InputError, match="in that library's layers too"):
        parallel.check(shared(strategy), bridged=True, after_state=False, quantized=False)
    parallel.check(shared(strategy), bridged=False, after_state=False, quantized=False)
    parallel.check(shared("deepspeed_stage_2"), bridged=True, after_state=True, quantized=True)


def test_fsdp_has_one_precision():
    settings = shared("fsdp").model_copy(update={"precision": "bf16"})
    with pytest.raises(InputError, match="one dtype"):
        parallel.check(settings, bridged=False, after_state=False, quantized=False)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("optimizer", {"kind": "muon", "momentum": 0.95}, "a step of Muon is of a whole matrix"),
        ("saves", {"every": 3}, "whole at the end of the run alone"),
        ("samples", {"every": 1, "prompts": ["a"], "max_tokens": 1, "temperature": 0, "top_p": 1}, "made by one"),
    ],
)
def test_what_needs_all_of_it_in_one_process_is_refused(strategy, section, change, message):
    given = {section: change, "parallel": {"strategy": strategy, "devices": None, "nodes": 1, "bucket_mb": 25}}
    with pytest.raises(InputError, match=message):
        parallel.check(train_config(**given), bridged=False, after_state=False, quantized=False)
    given["parallel"]["strategy"] = "ddp"
    parallel.check(train_config(**given), bridged=False, after_state=False, quantized=False)


ASKED = {"not_finite": "quarantine", "out_of_memory": "replan"}


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("fsdp", 2), ("fsdp", 1), ("deepspeed_stage_3", 1)])
def test_a_process_without_memory_beside_others_or_with_a_share_says_how_the_run_goes_on(strategy, world, tmp_path):
    """The others wait for it, or its share is not whole: nobody goes back, and the next run has smaller micro-batches."""
    config = shared(strategy, devices=world).model_copy(
        update={"guards": train_config(guards=ASKED).guards, "micro_batch": 4, "accumulate": 3}
    )
    last = Guards(tmp_path, config, None, Ranks(world - 1, world))
    with pytest.raises(WorldError, match="run again: the run continues with micro-batches of 2"):
        last.out_of_memory(torch.OutOfMemoryError("none left"))
    again = [Guards(tmp_path, config, None, Ranks(rank, world)).config for rank in range(world)]
    assert [(x.micro_batch, x.accumulate) for x in again] == [(2, 6)] * world


@pytest.mark.parametrize("strategy", ["one_device", "deepspeed_stage_2"])
def test_a_gradient_that_is_scaled_out_of_range_is_no_fault(strategy, tmp_path):
    found = []
    for precision in ("fp16", "bf16"):
        config = shared(strategy, devices=1).model_copy(update={"precision": precision})
        guards = Guards(tmp_path, config, None)
        found += [guards._finite(1.0, math.inf), guards._finite(1.0, 2.0), guards._finite(math.nan, 2.0)]
    assert found == [True, True, False, False, True, False]


SCRIPT = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def prepared(tmp_path, random_model):
    (tmp_path / "data").mkdir()
    draw = random.Random(0)
    for side, count in (("train", 31), ("valid", 7)):
        writer = Writer(tmp_path / "data" / side)
        for _ in range(count):
            first, size = draw.randrange(1, 30), draw.randrange(3, 18)
            writer.add([*range(first, first + size), 0], np.array([draw.random() < 0.7 for _ in range(size + 1)]))
        writer.close()
    checkpoint.write(tmp_path / "base.pth", random_model(n_layer=2).state_dict())
    return tmp_path


def settings(world, micro_batch, accumulate, strategy=None, **changes):
    optimizer = {
        "lr": 0.01,
        "lr_final": 0.001,
        "schedule": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.05,
        "eps": 1e-3,
    }
    return train_settings(
        micro_batch=micro_batch, accumulate=accumulate, l2_wrap=1e-4, validate_every=3, validate_rows=5, checkpoint_every=3,
        optimizer=optimizer | {"grad_clip": 0.5} | changes.pop("optimizer", {}),
        parallel={"strategy": strategy or ("one_device" if world == 1 else "ddp"), "devices": world},
        **{"rows": "pad", "ctx_len": 12} | changes,
    )  # fmt: skip


def start(folder, world, runs, **variables):
    """Do these runs in so many processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), SCRIPT, folder]
    if all(run["settings"]["parallel"]["strategy"] == "one_device" for run in runs):  # torchrun takes seconds
        command = [sys.executable, SCRIPT, folder]
        variables |= {"RANK": "0", "WORLD_SIZE": "1"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return {one["name"]: result(folder, one["name"]) for one in runs}


def result(folder, name):
    history, steps, tokens, resumed = json.loads((folder / f"{name}.json").read_text())
    return torch.load(folder / f"{name}.pth", weights_only=True), history, (steps, tokens), resumed


def one(name, method, world, stop=None, **given):
    return {"name": name, "method": method, "settings": settings(world, **given), "stop": stop}


def agree(mine, other, *, rel=1e-4):
    """To rounding, of float32, over all steps."""
    assert mine[2] == other[2]
    for side in ("train", "valid"):
        assert mine[1][side].keys() == other[1][side].keys()
        for step, row in mine[1][side].items():
            assert other[1][side][step] == pytest.approx(row, rel=rel), (side, step)
    assert mine[0].keys() == other[0].keys()
    for name, x in mine[0].items():
        torch.testing.assert_close(
            other[0][name], x, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def incidents(folder):
    found = [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]
    for incident in found:
        if incident["what"] == "not_finite":  # DeepSpeed says of any gradient that is not that it is infinite
            assert incident["values"].pop("grad_norm") in ("nan", "inf")
    return found


METHODS = {"lora": 0, "full": 5, "state": 6}
CHUNKS = {"rows": "chunk", "carry_state": True, "ctx_len": 4}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(prepared):
    """With masks, frozen parameters, unused ones, empty micro-batches, and states that go on; stopped and continued."""
    kinds = [*((name, {}) for name in METHODS), ("lora", CHUNKS), ("state", {"rows": "pack", "ctx_len": 20})]
    ones, twos = [], []
    for (method, changes), number in zip(kinds, itertools.count()):
        given = {"method": METHODS[method], **changes}
        ones.append(one(f"{number} alone", world=1, micro_batch=4, accumulate=1, **given))
        twos += [one(f"{number} {a}x{b}", world=2, micro_batch=a, accumulate=b, **given) for a, b in ((2, 1), (1, 2))]
    twos += [twos[i] | {"name": f"{twos[i]['name']} stopped", "stop": 4} for i in (1, 7)]
    alone, both = start(prepared, 1, ones), start(prepared, 2, twos)
    assert EXAMPLES[METHODS["full"]].kind == "full"
    for name, found in both.items():
        agree(alone[f"{name[0]} alone"], found)
        if name.endswith("stopped"):  # the same bytes, from the step that a signal to one of them has stopped both at
            same = both[name.removesuffix(" stopped")]
            assert found[3] == 4
            assert found[1] == same[1]
            assert all(torch.equal(x, same[0][key]) for key, x in found[0].items())


@pytest.mark.slow
def test_two_processes_go_back_and_leave_out_what_one_does(prepared):
    """Each by itself reads its micro-batches of the step; what one of them finds, a gradient that is no number or a large one,
    is known to both. Those with shares read one after the other, and what they train is whole again when they begin anew.
    """
    tensors = checkpoint.read(prepared / "base.pth")
    tensors["emb.weight"][29] = math.nan
    checkpoint.write(prepared / "bad.pth", tensors)
    # here the token is never thought of: its loss and gradient are large
    tensors = checkpoint.read(prepared / "base.pth")
    tensors["ln_out.bias"][:], tensors["head.weight"][29] = 1.0, -50.0
    checkpoint.write(prepared / "steep.pth", tensors)
    writer = Writer(prepared / "data" / "train")
    for i in range(31):
        writer.add([*range(1, 4 + i % 7), *([29] if i == 17 else []), 0])
    writer.close()
    writer = Writer(prepared / "data" / "valid")
    for size in (4, 9, 6):
        writer.add([*range(1, size), 0])
    writer.close()
    guards = {"not_finite": "quarantine", "dead_adapter": "warn", "dead_every": 2}
    given = {"method": METHODS["lora"], "micro_batch": 1, "guards": guards, "rows": "pad", "steps": 6, "epochs": None}
    steep = given | {"guards": {"blow_up": "quarantine", "blow_up_times": 4.0, "window": 8}, "steps": 17}
    first = [
        one("alone", world=1, accumulate=4, **given) | {"base": "bad.pth"},
        one("steep alone", world=1, accumulate=4, **steep) | {"base": "steep.pth"},
    ]
    alone, steep_alone = start(prepared, 1, first).values()
    chunks = given | CHUNKS | {"steps": 14}
    # segments change nothing but what the processes meet in
    strategies = {"ddp": {}, "fsdp": {}, "deepspeed_stage_2": {}, "deepspeed_stage_3": {"context": {"segment": 7}}}
    runs = [
        *(one(name, world=2, accumulate=2, strategy=name, **given | changes) for name, changes in strategies.items()),
        one("chunks", world=2, accumulate=2, **chunks),
        one("chunks stopped", world=2, accumulate=2, stop=4, **chunks),
    ]
    steeper = [
        one(f"steep {name}", world=2, accumulate=2, strategy=name, **steep | changes) | {"base": "steep.pth"}
        for name, changes in strategies.items()
    ]
    found = start(prepared, 2, [*(run | {"base": "bad.pth"} for run in runs), *steeper], DS_ACCELERATOR="cpu")
    met = {name: incidents(prepared / f"run {name}") for name in ("alone", "steep alone", *found)}
    for strategy in strategies:
        agree(alone, found[strategy], rel=1e-3)
        assert met["alone"] == met[strategy]
        agree(steep_alone, found[f"steep {strategy}"], rel=1e-3)
        assert [x["values"]["rows"] for x in met["steep alone"]] == [
            x["values"]["rows"] for x in met[f"steep {strategy}"]
        ]
    assert [(x["what"], x["action"]) for x in met["steep alone"]] == [("blow_up", "quarantined")]
    (incident,) = met["alone"]
    assert (incident["what"], incident["action"], len(incident["values"]["rows"])) == ("not_finite", "quarantined", 1)
    for strategy in strategies:
        (kept,) = (prepared / f"run {strategy}").glob(f"{incident['values']['kept'][0]}")
        reproduced = reproduce.reproduce(kept, prepared / "bad.pth")
        assert math.isnan(reproduced.now.loss)
        assert reproduced.first == "emb"
    assert met["chunks"] == met["chunks stopped"] != []
    assert found["chunks"][1] == found["chunks stopped"][1]
    assert all(torch.equal(x, found["chunks stopped"][0][name]) for name, x in found["chunks"][0].items())


@pytest.mark.slow
def test_two_processes_with_a_share_each_learn_what_one_device_does(prepared):
    """DeepSpeed and FSDP, on the CPU: with accumulation, a threshold below the norm, rows in segments, as many as the other has
    or not, rows that go on from others' states, blocks made again, and checkpoints that both go on from, to the same bytes.
    """
    pytest.importorskip("deepspeed")
    given = {"optimizer": {"grad_clip": 0.05}, "steps": 6, "epochs": None}
    kinds = {
        "lora": {"method": METHODS["lora"]} | given,
        "full": {"method": METHODS["full"]} | given,
        "segments": {"method": METHODS["lora"], "context": {"segment": 5}} | given,
        "carried": {"method": METHODS["lora"], "context": {"grad_cp": True}} | CHUNKS | given,
    }
    runs = [
        ("deepspeed_stage_1", "full", 4), ("deepspeed_stage_2", "segments", None), ("deepspeed_stage_2", "lora", 4),
        ("deepspeed_stage_3", "full", None), ("deepspeed_stage_3", "carried", 4), ("fsdp", "carried", 4),
        *((strategy, "segments", stop) for strategy in ("deepspeed_stage_3", "fsdp") for stop in (None, 4)),
    ]  # fmt: skip
    alone = start(prepared, 1, [one(kind, world=1, micro_batch=6, accumulate=1, **of) for kind, of in kinds.items()])
    asked = [
        one(
            f"{strategy} {kind} {stop}",
            world=2,
            micro_batch=1,
            accumulate=3,
            strategy=strategy,
            stop=stop,
            **kinds[kind],
        )
        for strategy, kind, stop in runs
    ]
    both = start(prepared, 2, asked, DS_ACCELERATOR="cpu")
    assert all(row["grad_norm"] > 0.05 for found in alone.values() for row in found[1]["train"].values())
    for strategy, kind, stop in runs:
        found, whole = both[f"{strategy} {kind} {stop}"], both.get(f"{strategy} {kind} None")
        agree(alone[kind], found, rel=1e-3)
        assert found[3] == (stop or 0)
        if whole is not None:
            assert found[1] == whole[1]
            assert all(torch.equal(x, whole[0][name]) for name, x in found[0].items())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["fsdp", *(f"deepspeed_stage_{stage}" for stage in ("1", "2", "2_offload", "3", "3_offload"))],
)
def test_one_process_on_a_card_learns_what_one_device_does(strategy, prepared):
    pytest.importorskip("deepspeed")
    given = {"method": METHODS["lora"], "optimizer": {"grad_clip": 0.05}, "steps": 7, "epochs": None}
    runs = [
        one("alone", world=1, micro_batch=6, accumulate=1, **given),
        one("shared", world=1, micro_batch=2, accumulate=3, strategy=strategy, **given),
        one("stopped", world=1, micro_batch=2, accumulate=3, strategy=strategy, stop=4, **given),
    ]
    found = start(prepared, 1, runs)
    agree(found["alone"], found["shared"], rel=1e-3)
    agree(found["alone"], found["stopped"], rel=1e-3)
    assert found["stopped"][3] == 4
