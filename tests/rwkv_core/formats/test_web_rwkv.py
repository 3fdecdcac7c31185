"""Against the facts of web-rwkv's own converter, written down here once more."""

import checkpoints
import pytest
import safetensors.torch
import torch
from checkpoints import same

from rwkv_core import checkpoint, models
from rwkv_core.errors import InputError
from rwkv_core.formats import web_rwkv

READ = ("4", "5.1", "5.2", "6", "7")
RENAMED = (("time_faaaa", "time_first"), ("time_maa", "time_mix"))
TURNED = ("w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2", "time_state")


def as_its_converter_does(tensors, per_head):
    converted = {}
    for name, x in tensors.items():
        if per_head and ("time_decay" in name or "time_faaaa" in name):
            x = x.unsqueeze(1).repeat(1, tensors["emb.weight"].shape[1] // len(x))
        for ours, theirs in RENAMED:
            name = name.replace(ours, theirs)
        if any(part in name for part in TURNED):
            x = x.transpose(-2, -1)
        converted[name.lower()] = x.half().contiguous()
    return converted


@pytest.mark.parametrize("version", READ)
def test_it_is_what_its_converter_makes(version, tmp_path):
    tensors = checkpoints.official(version, dtype=torch.bfloat16)
    tensors["blocks.0.att.time_state"] = torch.randn(5, 8, 8).half()
    web_rwkv.write(tmp_path / "model.st", tensors)
    written = safetensors.torch.load_file(tmp_path / "model.st")
    wanted = as_its_converter_does(tensors, version == "5.1")
    same({name: written[name] for name in sorted(written)}, {name: wanted[name] for name in sorted(wanted)})


@pytest.mark.parametrize("version", READ)
@pytest.mark.parametrize("name", ["model.st", "model.safetensors"])
def test_reading_is_the_inverse(name, version, tmp_path):
    """Whatever the file's name: only a state alone needs it."""
    tensors = checkpoints.official(version)
    web_rwkv.write(tmp_path / name, tensors)
    same(checkpoint.read(tmp_path / name), tensors)
    assert models.load(tmp_path / name).config.version == version


@pytest.mark.parametrize("version", checkpoints.VERSIONS)
def test_official_safetensors_are_not_taken_for_it(version, tmp_path):
    tensors = checkpoints.official(version)
    same(checkpoint.read(checkpoints.save_safetensors(tmp_path, tensors)), tensors)


@pytest.mark.parametrize(("name", "turned"), [("model.st", True), ("model.safetensors", False)])
def test_where_a_rank_is_the_width_the_name_decides(name, turned, tmp_path):
    """Of one rank, the others decide; of all, nothing in the file does."""
    square = checkpoints.official("7", n_embd=32)
    assert {x.shape for n, x in square.items() if n.endswith((".w1", ".a2", ".g1", ".v2"))} == {(32, 32)}
    written = web_rwkv.from_official(square) if turned else square
    same(checkpoint.read(checkpoints.save_safetensors(tmp_path, written, name)), square)
    mixed = square | {f"blocks.{i}.att.g1": torch.randn(32, 48).half() for i in (0, 1)}
    mixed |= {f"blocks.{i}.att.g2": torch.randn(48, 32).half() for i in (0, 1)}
    other = "model.safetensors" if turned else "model.st"
    written = web_rwkv.from_official(mixed) if turned else mixed
    same(checkpoint.read(checkpoints.save_safetensors(tmp_path, written, other)), mixed)


@pytest.mark.parametrize("name", ["x.st", "x.state"])
def test_a_state_is_turned_around(name, tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 4, 4).half() for i in (0, 1)}
    web_rwkv.write(tmp_path / name, states)
    written = safetensors.torch.load_file(tmp_path / name)
    assert all(torch.equal(written[n], x.mT) for n, x in states.items())
    same(checkpoint.read(tmp_path / name), states)


def test_what_is_read_is_plain(tmp_path):
    read = checkpoint.read(checkpoints.save_st(tmp_path, checkpoints.official("7")))
    assert all(x.is_contiguous() for x in read.values())


def test_names_are_in_lower_case(tmp_path):
    web_rwkv.write(tmp_path / "x.st", {"Blocks.0.att.LN_X.weight": torch.ones(2)})
    assert list(safetensors.torch.load_file(tmp_path / "x.st")) == ["blocks.0.att.ln_x.weight"]


def test_5_0_is_refused_both_ways(tmp_path):
    tensors = checkpoints.official("5.0")
    with pytest.raises(InputError, match="web-rwkv reads neither"):
        web_rwkv.write(tmp_path / "model.st", tensors)
    with pytest.raises(
        InputError, match=r"model\.st: blocks\.0\.att\.time_first has a value a head: .*; give the \.pth"
    ):
        checkpoint.read(checkpoints.save_safetensors(tmp_path, tensors, "model.st"))
