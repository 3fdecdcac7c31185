"""A damaged checkpoint is refused, or it loads as what it was. It never crashes, and never loads as something else.

What a tensor's own bytes hold can't be checked: a flipped bit there is another weight. All else can, so the damage is there.
"""

import random
import shutil

import checkpoints
import pytest
import torch

from rwkv_core import models
from rwkv_core.errors import InputError
from rwkv_core.formats import container, huggingface, web_rwkv

FORMS = list(checkpoints.FORMS)
CASES = 500
VERSIONS = ("4", "5.2", "6", "7", "7", "7")
DTYPES = (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64, torch.float32)


STORED = {"st": web_rwkv.from_official, "Hugging Face": huggingface.from_official}
"""The names and shapes that are in a file, where they are not the official ones."""


def save(form, folder, tensors):
    """Store names and shapes as given: the writers would mend them."""
    if form in ("pth", "legacy pth"):
        return checkpoints.FORMS[form](folder, {name: x.contiguous().clone() for name, x in tensors.items()})
    if form == "Hugging Face":
        return checkpoints.save_parts(folder, tensors)
    return checkpoints.save_safetensors(folder, tensors, f"model.{form}")


def places(path):
    """Offsets of all bytes in a file that are no tensor's."""
    data = path.read_bytes()
    free = bytearray(b"\1" * len(data))
    if path.suffix != ".json":
        for x in container.read(path).values():
            raw = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            at = data.index(raw)
            free[at : at + len(raw)] = bytes(len(raw))
    return [at for at, is_free in enumerate(free) if is_free]


# What can happen to a file's bytes: (bytes, places, dice) -> bytes


def cut(data, _, dice):
    return data[: dice.randrange(len(data))]


def flip(data, free, dice):
    damaged = bytearray(data)
    for at in dice.sample(free, dice.choice((1, 1, 1, 2, 8))):
        damaged[at] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def flip_at_the_end_or_begin(data, free, dice):
    return flip(data, dice.choice((free[:64], free[-64:])), dice)


def large_number(data, free, dice):
    """Lengths and offsets are in four or eight bytes."""
    size = dice.choice((4, 8))
    at = dice.choice((0, *(at for at in dice.sample(free, 8) if at + size <= len(data) and at + size - 1 in free)))
    return (
        data[:at] + dice.choice((0, 2**31 - 1, 2**32 - 1, 2**40 % 2**32)).to_bytes(size, "little") + data[at + size :]
    )


def text_in_between(data, free, dice):
    at = dice.choice(free)
    return data[:at] + dice.choice((b"\x00", b"}", b'"', b"0", b"\x80\x02")) + data[at:]


# What can be wrong in the names and tensors: (tensors, dice) -> tensors


def rename(tensors, dice):
    name = dice.choice(list(tensors))
    at = dice.randrange(len(name))
    other = name[:at] + dice.choice("abkrvwx0129._") + name[at + dice.choice((0, 1)) :]
    return {other if n == name else n: x for n, x in tensors.items()}


def drop(tensors, dice):
    name = dice.choice(list(tensors))
    return {n: x for n, x in tensors.items() if n != name}


def twice(tensors, dice):
    name = dice.choice(list(tensors))
    prefix = dice.choice(("model.", "_forward_module.", "base_model.model.", "_forward_module.model."))
    return tensors | {prefix + name: tensors[name] + dice.choice((0, 1))}


def another_dtype(tensors, dice):
    name = dice.choice(list(tensors))
    return tensors | {name: tensors[name].float().to(dice.choice(DTYPES))}


def swapped(tensors, dice):
    """Of a square matrix, nobody could tell."""
    name = dice.choice([n for n, x in tensors.items() if len(set(x.shape)) > 1])
    x = tensors[name]
    i, j = dice.sample(range(x.ndim), 2)
    return tensors | {name: x.transpose(i, j)}


def another_shape(tensors, dice):
    name = dice.choice(list(tensors))
    x = tensors[name]
    changed = (x.flatten(), x[None], x[..., None], x[:-1], x[..., :0], torch.cat((x, x)), x.flatten()[0])
    return tensors | {name: dice.choice(changed)}


TO_BYTES = (cut, flip, flip, flip, flip_at_the_end_or_begin, large_number, text_in_between)
TO_TENSORS = (rename, rename, drop, twice, another_dtype, swapped, another_shape)


def damage(dice, whole, folder):
    """One damaged checkpoint: (what was done, its path, the tensors that it had)."""
    form, version, change = dice.choice(FORMS), dice.choice(VERSIONS), dice.choice((*TO_BYTES, *TO_TENSORS))
    tensors, path = whole[version, form]
    what = f"{change.__name__} in {form} of RWKV-{version}"
    if change in TO_TENSORS:
        return what, save(form, folder, change(STORED.get(form, dict)(tensors), dice)), tensors
    shutil.copytree(path if path.is_dir() else path.parent, folder, dirs_exist_ok=True)
    file = dice.choice(sorted(folder.iterdir()))
    data = file.read_bytes()
    file.write_bytes(change(data, places(path / file.name if path.is_dir() else path), dice))
    return f"{what}, {file.name}", folder if path.is_dir() else file, tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every version in every form, undamaged: its tensors and its path."""
    made = {}
    for version in set(VERSIONS):
        tensors = checkpoints.official(version, n_layer=2, n_embd=24, head_size=4, vocab_size=10)
        for form in FORMS:
            made[version, form] = tensors, checkpoints.FORMS[form](tmp_path_factory.mktemp("whole"), tensors)
    return made


@pytest.mark.filterwarnings("ignore")
def test_damage_is_refused_or_does_no_harm(whole, tmp_path):
    dice = random.Random(20)
    refused = 0
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        what, path, tensors = damage(dice, whole, folder)
        try:
            loaded = models.load(path).state_dict()
            parts = [str(path)]
        except InputError as error:
            loaded, parts = tensors, [error.value, error.rule, error.remedy]
            refused += 1
        assert all(parts), what
        assert str(path) in " ".join(parts), (what, parts)
        assert loaded.keys() == tensors.keys(), what
        assert all(torch.equal(loaded[name], x) for name, x in tensors.items()), what
        shutil.rmtree(folder)
    assert refused > CASES * 0.6  # damage that did no harm would show nothing
