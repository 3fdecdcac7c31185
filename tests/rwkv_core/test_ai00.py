"""By web-rwkv's rule, written down here once more: W + alpha / rank * lora.1 times lora.0 turned around; vectors replace."""

import json
import re
import struct
import tomllib

import conformed
import golden_adapters as golden
import methods
import pytest
import torch

from rwkv_core import ai00, checkpoint
from rwkv_core.adapters import file
from rwkv_core.conformance.report import faults
from rwkv_core.errors import InputError

BASE = golden.FOLDER / "base-7.pth"
MOUNTED = {"own-lora": 4, "own-rslora": 4, "own-pissa": 8, "own-bone": 4}
"""What can be, and the rank in its file, a multiple of 4."""


def read_safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F16"
        start, end = entry["data_offsets"]
        values = struct.unpack(f"<{(end - start) // 2}e", data[8 + length + start : 8 + length + end])
        tensors[name] = torch.tensor(values).view(entry["shape"])
    return tensors


def mounted(base, stored, alpha):
    """What the engine makes of a base."""
    result = {}
    for name, x in base.items():
        module = name.removesuffix(".weight")
        if re.fullmatch(r"blocks\.\d+\.(att|ffn)\.(key|value|receptance|gate|output)\.weight", name):
            low, high = stored.pop(f"{module}.lora.0"), stored.pop(f"{module}.lora.1")
            rank = low.shape[1]
            assert rank % 4 == 0  # its shader reads four at a time
            result[name] = x + alpha / rank * (high @ low.T)
        else:
            result[name] = stored.pop(name, x)
    assert not stored
    return result


@pytest.mark.parametrize("name", MOUNTED)
def test_the_engine_makes_of_it_what_the_merge_does(name, tmp_path):
    receipt = ai00.export(golden.FOLDER / f"{name}.pth", tmp_path, BASE if name == "own-bone" else None)
    (recipe,) = tomllib.loads((tmp_path / "lora.toml").read_text())["lora"]
    assert recipe["path"] == "lora.st"
    stored = read_safetensors(tmp_path / "lora.st")
    got = mounted(golden.base("7"), stored, recipe["alpha"])
    for tensor, want in golden.every()[name].merged.items():
        torch.testing.assert_close(got[tensor], want, rtol=0, atol=1e-6 if name == "own-rslora" else 0)
    assert (receipt["rank"], receipt["alpha"], receipt["matrices"]) == (MOUNTED[name], recipe["alpha"], 12)
    assert set(receipt["files"]) == {"lora.st", "lora.toml"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.pth"
    checkpoint.write(path, conformed.model(n_layer=3).state_dict())
    return path


@pytest.mark.parametrize("config", [*methods.EXAMPLES[:3], methods.OTHERS[2]], ids=lambda config: config.kind)
def test_what_the_engine_reads_conforms(config, base, tmp_path):
    """By the reader of web-rwkv's rules, with the base in float16; no file of that is left."""
    adapter, out = methods.adapter(base, config, tmp_path / "adapter.pth"), tmp_path / "out"
    checked = ai00.conform(adapter, out, ai00.export(adapter, out, base), base, "full")
    assert [one.passed for one in checked] == [True] * len(checked), [faults(one) for one in checked]
    files = [("lora.st", "lora"), *([("lora.state", "st state")] if config.state != "none" else [])]
    assert [(one.file, one.format) for one in checked] == files
    assert all(one.reader == "reference" and len(one.logits) == 3 for one in checked)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.pth", "out"}


@pytest.mark.parametrize("fault", ["alpha", "turned", "another pair", "no vector", "turned state"])
def test_a_fault_of_the_export_is_found(fault, base, tmp_path, monkeypatch):
    adapter, pair = methods.adapter(base, methods.OTHERS[2], tmp_path / "adapter.pth"), ai00._pair
    write, vectors = ai00.web_rwkv.write, ai00.web_rwkv.from_official
    match fault:
        case "alpha":
            monkeypatch.setattr(ai00, "_scale", lambda config: 1.0)
        case "turned":
            monkeypatch.setattr(ai00, "_pair", lambda parts, inputs: tuple(x.mT for x in pair(parts, inputs)[::-1]))
        case "another pair":
            monkeypatch.setattr(ai00, "_pair", lambda *given: (pair(*given)[0].flip(0), pair(*given)[1]))
        case "no vector":
            monkeypatch.setattr(
                ai00.web_rwkv, "from_official", lambda x: {k: y for k, y in vectors(x).items() if "ln2.weight" not in k}
            )
        case _:
            monkeypatch.setattr(ai00.web_rwkv, "write", lambda path, x: write(path, {k: y.mT for k, y in x.items()}))
    report = ai00.export(adapter, tmp_path / "out")
    monkeypatch.setattr(ai00.web_rwkv, "write", write)
    monkeypatch.setattr(ai00.web_rwkv, "from_official", vectors)
    checked = ai00.conform(adapter, tmp_path / "out", report, base, "full")
    assert [one.passed for one in checked] == ([True, False] if fault == "turned state" else [False, True])


def test_alpha_is_that_of_the_training_where_the_rank_is(tmp_path):
    assert ai00.export(golden.FOLDER / "own-lora.pth", tmp_path)["alpha"] == golden.ALPHA
    assert ai00.export(golden.FOLDER / "own-rslora.pth", tmp_path)["alpha"] == golden.ALPHA * golden.RANK**0.5


def changed(tmp_path, *, quantize="none", adapter=None, **more):
    """The LoRA with other settings or further tensors, in a file of its own."""
    tensors, record = file.read(golden.FOLDER / "own-lora.pth")
    about = {"quantize": quantize, "adapter": record.adapter.model_copy(update=adapter or {})}
    path = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}.pth"
    file.write(path, tensors | more, record.model_copy(update=about))
    return path


def test_a_rank_that_shaders_cannot_read_is_filled_up(tmp_path):
    tensors, record = file.read(golden.FOLDER / "own-lora.pth")
    cut = {name: x[:3] if name.endswith("lora_A") else x[:, :3] for name, x in tensors.items()}
    config = record.adapter.model_copy(update={"rank": 3})
    file.write(tmp_path / "three.pth", cut, record.model_copy(update={"adapter": config}))
    receipt = ai00.export(tmp_path / "three.pth", tmp_path)
    assert (receipt["rank"], receipt["alpha"]) == (4, golden.ALPHA / 3 * 4)
    base, stored = golden.base("7"), read_safetensors(tmp_path / "lora.st")
    got = mounted(base, stored, receipt["alpha"])
    name = "blocks.1.ffn.value"
    want = base[f"{name}.weight"] + golden.ALPHA / 3 * (cut[f"{name}.lora_B"].float() @ cut[f"{name}.lora_A"].float())
    torch.testing.assert_close(got[f"{name}.weight"], want)


def test_its_state_is_written_beside(tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.arange(32.0).view(2, 4, 4) + i for i in range(2)}
    shifts = {f"blocks.{i}.att.ts_state": torch.ones(8) for i in range(2)}
    receipt = ai00.export(changed(tmp_path, **states, **shifts), tmp_path / "out")
    assert set(receipt["files"]) == {"lora.st", "lora.toml", "lora.state"}
    stored = read_safetensors(tmp_path / "out/lora.state")
    assert {name: x.tolist() for name, x in stored.items()} == {name: x.mT.tolist() for name, x in states.items()}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("own-bat", "ai00 of bat: Bat's change depends on the matrix: that is no sum of a low rank; merge it"),
        ("own-peft", "ai00 of peft: which form it has, the peft package alone knows"),
        ("own-full", "ai00 of full: all of the model was trained"),
        ("own-bone", r"how wide its matrices are, a Bone's base alone says; give --base"),
        ("peft-bone-2024", "has no record of its base and settings"),
    ],
)
def test_what_is_no_sum_of_low_rank_is_refused(name, found, tmp_path):
    with pytest.raises(InputError, match=found):
        ai00.export(golden.FOLDER / f"{name}.pth", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_engine_would_compute_otherwise_is_refused(tmp_path):
    for path, found in (
        (changed(tmp_path, quantize="nf4"), "trained beside a base in nf4: Ai00 has another"),
        (changed(tmp_path, adapter={"dora": True}), "ai00 of dora: DoRA gives every row a length"),
        (changed(tmp_path, **{"head.weight": torch.zeros(5, 8)}), r"ai00 with head\.weight: it mounts pairs"),
        (changed(tmp_path, **{"blocks.0.att.r_k": torch.zeros(2, 4)}), r"ai00 with blocks\.0\.att\.r_k"),
        (changed(tmp_path, **{"blocks.0.ln1.weight": torch.full((8,), 7e4)}), "float16 ends at 65504"),
    ):
        with pytest.raises(InputError, match=found):
            ai00.export(path, tmp_path / "out")
    with pytest.raises(InputError, match="was trained on another base"):
        ai00.export(golden.FOLDER / "own-bone.pth", tmp_path / "out", golden.FOLDER / "base-4.pth")
