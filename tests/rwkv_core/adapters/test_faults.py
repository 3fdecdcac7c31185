"""That the tests of adapters prove something: each fault, planted, must fail a check that passes without it."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import random_models
import torch
from golden_adapters import FOLDER, every
from methods import EXAMPLES

from rwkv_core import checkpoint, foreign, models
from rwkv_core.adapters import bat, bone, file, lora, pissa
from rwkv_core.errors import InputError
from rwkv_core.merge import Part, merge
from rwkv_core.models import state
from tests.rwkv_core.adapters import test_adapters, test_golden
from tests.rwkv_core.models import test_versions

LORA, PISSA, BONE, BAT, *_ = EXAMPLES
SQUARE = LORA.model_copy(update={"rank": 32, "targets": ("att.*",)})  # A and B are of one shape


# The checks. Each is a test of this suite, called with what its fixtures would give it.


def keeps_the_function(config, folder):
    base = folder / "base.pth"
    checkpoint.write(base, random_models.make().state_dict())
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    test_adapters.test_merging_keeps_the_function(config, base, tokens, folder)


def merges_as_the_formulas_say(name, folder):
    test_golden.test_it_merges_to_what_the_formulas_say(name, folder)


def refuses_another_base(folder):
    base = folder / "base.pth"
    checkpoint.write(base, random_models.make().state_dict())
    model = models.load(base)
    test_adapters.attach(model, LORA, seed=0)
    file.write(folder / "adapter.pth", test_adapters.trained_state(model), test_adapters.record(base, LORA))
    test_adapters.test_merge_refuses_another_base(base, folder / "adapter.pth", random_models.make, folder)


def state_is_the_official_package_s(folder):
    """RWKV-6's takes it out of the model's file, where RWKV-PEFT's merge puts it, and turns it to its own layout."""
    model = random_models.make(version="6", n_layer=2, n_embd=64, head_size=16)
    tensors = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    checkpoint.write(folder / "both.pth", model.state_dict() | tensors)
    tokens = list(range(1, 12))
    subprocess.run(
        [sys.executable, "-c", test_versions.OFFICIAL],
        env=os.environ | {"RWKV_V7_ON": "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"},
        input=json.dumps([(str(folder / "both"), tokens, [len(tokens)])]),
        check=True,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    want = torch.load(folder / "both.out")["whole"]
    with torch.no_grad():
        found, _ = model(torch.tensor([tokens]), state.mount(model.initial_state(1), tensors))
    torch.testing.assert_close(found[0], want, rtol=1e-3, atol=1e-3)


# The faults.


class Fault(NamedTuple):
    """Something of production in whose place something wrong is put, and the check that must see it."""

    check: Callable[[Path], None]
    owner: Any
    name: str
    broken: Any


def keeps(config):
    return functools.partial(keeps_the_function, config)


def golden(name):
    return functools.partial(merges_as_the_formulas_say, name)


def halved(config):
    return SOUND["scale"](config) / 2


def swapped(weight, parts, config):
    return torch.addmm(weight, parts["lora_A"], parts["lora_B"], alpha=lora.scale(config))


def by_outputs(weight, parts, config):
    """As Hugging Face's MiSS in its mode "bat": the small matrix is that of the rows' block."""
    (out, into), r = weight.shape, config.rank
    blocks = weight.reshape(out // r, r, into // r, r)
    d = parts["disha"][torch.arange(out // r) % (into // r)]
    return (blocks + torch.einsum("aibj,ajk->aibk", blocks, d) + d[:, :, None]).reshape(out, into)


def padded_before(weight, parts, config):
    into = weight.shape[1]
    missing = -into % config.rank
    return weight + parts["disha"].mT[:, (torch.arange(into) + missing) % config.rank]


def one_too_many(weight, parts, config):
    return weight + parts["disha"].mT[:, (torch.arange(weight.shape[1]) + 1) % config.rank]


def nothing_taken_out(weight, parts, config):
    return weight


def without_stabilizing(config):
    return config.alpha / config.rank


def any_base(base, base_sha256, path, remedy):
    return file.read(path)


def turned(start, tuned):
    return SOUND["mount"](start, {name: x.mT for name, x in tuned.items()})


def scaled_twice(config):
    return SOUND["scale"](config) ** 2


SOUND = {"scale": lora.scale, "mount": state.mount}

FAULTS = {
    "alpha halved": Fault(golden("own-lora"), lora, "scale", halved),
    "alpha halved, in another program's": Fault(golden("peft-lora"), lora, "scale", halved),
    "scaled twice": Fault(golden("hf-lora"), lora, "scale", scaled_twice),
    "alpha / rank where it is rsLoRA": Fault(golden("own-rslora"), lora, "scale", without_stabilizing),
    "alpha / rank where Hugging Face's is rsLoRA": Fault(golden("hf-rslora"), lora, "scale", without_stabilizing),
    "A and B swapped": Fault(keeps(SQUARE), lora.LoraLinear, "merged", staticmethod(swapped)),
    "wrong base": Fault(refuses_another_base, file, "read_for", any_base),
    "transposed state": Fault(state_is_the_official_package_s, state, "mount", turned),
    "Bat by blocks of outputs": Fault(golden("peft-bat"), bat.BatLinear, "merged", staticmethod(by_outputs)),
    "Bat by blocks of outputs, trained": Fault(keeps(BAT), bat.BatLinear, "merged", staticmethod(by_outputs)),
    "Bone padded in front": Fault(keeps(BONE), bone.BoneLinear, "merged", staticmethod(padded_before)),
    "Bone padded in front, another program's": Fault(
        golden("peft-bone-2024"), bone.BoneLinear, "merged", staticmethod(padded_before)
    ),
    "Bone off by one": Fault(keeps(BONE), bone.BoneLinear, "merged", staticmethod(one_too_many)),
    "PiSSA's beginning not subtracted": Fault(
        keeps(PISSA), pissa.PissaLinear, "frozen", staticmethod(nothing_taken_out)
    ),
    "PiSSA's beginning not subtracted, of two files": Fault(
        golden("peft-pissa"), pissa.PissaLinear, "frozen", staticmethod(nothing_taken_out)
    ),
    "rank read from the other axis": Fault(golden("peft-lora"), foreign, "_RANK", foreign._RANK | {"lora_A": 1, "lora_B": 0}),
    "rank of Bone read from the other axis": Fault(golden("hf-miss"), foreign, "_RANK", foreign._RANK | {"disha": 1}),
    "a prefix left": Fault(golden("deepspeed-lora"), checkpoint, "_PREFIXES", ("model.",)),
    "an older name not known": Fault(golden("peft-bone-2024"), foreign, "_NAMES", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name, tmp_path, monkeypatch):
    fault = FAULTS[name]
    for folder in ("sound", "broken"):
        (tmp_path / folder).mkdir()
    fault.check(tmp_path / "sound")
    monkeypatch.setattr(fault.owner, fault.name, fault.broken)
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception)):
        fault.check(tmp_path / "broken")


# Files that are wrong are refused by name. Each change is made to a file that merges.


def swap(tensors):
    names = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {
        f"{n.rpartition('.')[0]}.{names.get(n.rpartition('.')[2], n.rpartition('.')[2])}": x for n, x in tensors.items()
    }


def as_miss(tensors):
    return {f"base_model.model.{name.replace('disha', 'miss_block')}": x for name, x in tensors.items()}


def trained_state(tensors):
    return tensors | {"blocks.1.att.time_state": torch.ones(2, 4, 4)}


WRONG = {
    "A and B swapped": ("own-lora", swap, r"receptance: does not fit the base: has .*'lora_B': \(4, 8\).*must be .*\(8, 4\)"),
    "A and B swapped, another program's": ("peft-lora", swap, r"lora of ranks \[8, 32\]: must be of one method and rank"),
    "Bat as Hugging Face's": ("peft-bat", as_miss, r'miss_block \(2, 4, 4\): MiSS in its mode "bat" is not known here'),
    "an init file forgotten": ("peft-pissa", lambda x: x, "a LoRA's alpha is not in its file; say --alpha"),
    "a state among them": ("peft-bone", trained_state, r"blocks.1.att.time_state \(2, 4, 4\): a tuned state is what"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(name, tmp_path):
    golden, change, message = WRONG[name]
    about = every()[golden]
    test_golden.test_it_merges_to_what_the_formulas_say(golden, tmp_path)
    wrong = tmp_path / "wrong.pth"
    tensors = change(checkpoint.read(FOLDER / about.path))
    record = file.read_record(FOLDER / about.path)
    if record is None:
        torch.save(tensors, wrong)
    else:
        file.write(wrong, tensors, record)
    with pytest.raises(InputError, match=message):
        merge(FOLDER / "base-7.pth", [Part(wrong, alpha=about.alpha)], tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
