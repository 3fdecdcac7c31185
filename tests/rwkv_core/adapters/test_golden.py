"""Every layout that was ever written is read, and means what it meant. See tests/golden_adapters.py."""

import json

import pytest
import torch
from golden_adapters import DIGESTS, FOLDER, STATE, digest, every, write

from rwkv_core import checkpoint
from rwkv_core.adapters import METHODS, file
from rwkv_core.describe import describe
from rwkv_core.errors import InputError
from rwkv_core.formats import container
from rwkv_core.merge import Part, merge

EVERY = every()


@pytest.mark.parametrize("name", EVERY)
def test_it_merges_to_what_the_formulas_say(name, tmp_path):
    golden = EVERY[name]
    part = Part(FOLDER / golden.path, alpha=golden.alpha, init=golden.init and FOLDER / golden.init)
    receipt = merge(FOLDER / f"base-{golden.version}.pth", [part], tmp_path / "merged.pth")
    found = checkpoint.read(tmp_path / "merged.pth")
    assert list(found) == list(golden.merged)
    different = [name for name, x in golden.merged.items() if not torch.equal(found[name], x)]
    assert not different
    assert digest(found) == json.loads(DIGESTS.read_text())[name]
    assert receipt["adapters"][0]["base_checked"] == name.startswith("own-")


def test_every_method_has_files():
    assert {name.removeprefix("own-") for name in EVERY if name.startswith("own-")} >= {*METHODS, "full"}
    stored = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    others = {"base-4.pth", "base-7.pth", "peft-state.pth", DIGESTS.name}
    assert stored == others | {path for golden in EVERY.values() for path in golden.files}


def test_writing_them_anew_gives_the_same(tmp_path):
    write(tmp_path)
    stored = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file())
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()) == stored
    for path in stored:
        one, other = FOLDER / path, tmp_path / path
        if path.suffix == ".json":
            assert one.read_text() == other.read_text()
            continue
        want, got = container.read(one), container.read(other)
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], x) and got[name].dtype == x.dtype for name, x in want.items()), path
        if path.name.startswith("own-"):
            records = [file.read(x)[1].model_dump(exclude={"base_sha256"}) for x in (one, other)]
            assert records[0] == records[1]


@pytest.mark.parametrize("name", EVERY)
def test_it_is_described(name):
    """A PiSSA by its init file: without it, it looks like a LoRA."""
    found = describe(FOLDER / next(reversed(EVERY[name].files)))
    word = name.split("-")[1]
    kind = {"emb": "bone", "miss": "bone", "rslora": "lora"}.get(word, word)
    assert found["kind"] == kind
    assert kind in ("full", "peft") or str(found["rank"]) == ("3" if kind == "bone" else "4")


def test_a_tuned_state_is_known_and_not_merged(tmp_path):
    path = FOLDER / "peft-state.pth"
    assert describe(path)["is"] == "a tuned state"
    assert all(torch.equal(x.float(), STATE[name]) for name, x in container.read(path).items())
    with pytest.raises(InputError, match="a tuned state is what a model begins with"):
        merge(FOLDER / "base-7.pth", [Part(path)], tmp_path / "merged.pth")
