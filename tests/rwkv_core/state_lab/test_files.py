import pytest
import torch
from random_models import make

from rwkv_core import checkpoint, state_lab
from rwkv_core.adapters import file
from rwkv_core.adapters.file import AdapterRecord, Ingredient
from rwkv_core.config import LoraConfig
from rwkv_core.describe import describe
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.formats import tuned_state, web_rwkv
from rwkv_core.state_lab import agree, mix, read, write

BASE, OTHER = "a" * 64, "b" * 64


def tensors(seed=0, *, layers=3, heads=4, size=8, shift=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(layers):
        found[f"blocks.{i}.att.time_state"] = torch.randn(heads, size, size, generator=generator).to(dtype)
        if shift:
            for part in ("att", "ffn"):
                found[f"blocks.{i}.{part}.ts_state"] = torch.randn(heads * size, generator=generator).to(dtype)
    return found


@pytest.fixture
def saved(tmp_path):
    """Writes a state, with a record if it has a base, and reads it."""

    def save(name="one", base=None, ending=".pth", **how):
        path = tmp_path / f"{name}{ending}"
        if ending != ".pth":
            web_rwkv.write(path, tensors(**how))
        elif base is None:
            checkpoint.write(path, tensors(**how))
        else:
            write(path, tensors(**how), base, None, ())
        return read(tuned_state.whole(path) if how.get("shift") and base else path)

    return save


def test_the_mean_of_states_is_that_of_their_numbers(saved):
    one, two = saved("one", seed=0), saved("two", seed=1)
    mixed = mix([one, two], [0.25, 0.75])
    assert list(mixed) == list(one.tensors)
    for name, x in mixed.items():
        torch.testing.assert_close(x, 0.25 * tensors(0)[name] + 0.75 * tensors(1)[name])


def test_a_state_is_the_mean_of_itself(saved):
    for dtype in (torch.float32, torch.bfloat16):
        one = saved(dtype=dtype)
        mixed = mix([one, one], [0.25, 0.75])
        assert all(torch.equal(mixed[name], x) and mixed[name].dtype == dtype for name, x in one.tensors.items())


def test_states_of_two_precisions_make_one_of_the_larger(saved):
    one, two = saved("one", dtype=torch.bfloat16), saved("two", seed=1, dtype=torch.float16)
    assert {x.dtype for x in mix([one, two], [0.5, 0.5]).values()} == {torch.float32}


def test_the_token_shift_is_mixed_too(saved):
    one, two = saved("one", BASE, shift=True), saved("two", BASE, shift=True, seed=1)
    assert one.kind == "wkv and token shift"
    mixed = mix([one, two], [0.5, 0.5])
    name = "blocks.1.ffn.ts_state"
    torch.testing.assert_close(mixed[name], (one.tensors[name] + two.tensors[name]) / 2)
    with pytest.raises(InputError, match=r"bare\.pth has no token shift, and the other does"):
        mix([one, saved("bare")], [0.5, 0.5])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"layers": 4},
            "two.pth: 4 blocks of 4 heads of 8: .*one.pth has 3 blocks of 4 heads of 8; give states of one",
        ),
        ({"heads": 2}, "3 blocks of 2 heads of 8"),
        ({"size": 4}, "3 blocks of 4 heads of 4"),
        ({"base": OTHER}, r"two.pth belongs to the base bbbbbbbbbbbb.*one.pth belongs to aaaaaaaaaaaa"),
    ],
    ids=str,
)
def test_states_of_different_models_are_refused(saved, how, message):
    one, two = saved("one", BASE), saved("two", **how)
    for call in (lambda: agree(one, two), lambda: mix([one, two], [0.5, 0.5])):
        with pytest.raises(InputError, match=message):
            call()


def test_one_that_does_not_say_its_base_may_be_mixed(saved):
    agree(saved("one", BASE), saved("two"))


def test_each_is_compared_with_each(saved):
    with pytest.raises(InputError, match=r"three\.pth belongs to the base bbb"):
        mix([saved("one"), saved("two", BASE), saved("three", OTHER)], [0.3, 0.3, 0.4])


def test_a_state_belongs_to_its_model(saved, tmp_path):
    one = saved("one", BASE)
    state_lab.fits(one, BASE, tmp_path / "m.pth")
    state_lab.fits(saved("two"), BASE, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"one.pth belongs to the base aaaaaaaaaaaa.*m.pth is bbbbbbbbbbbb"):
        state_lab.fits(one, OTHER, tmp_path / "m.pth")


def test_a_file_says_what_it_was_made_of(tmp_path):
    made_of = [Ingredient(kind="state", name="a.pth", sha256="1" * 64, weight=0.5)]
    files = write(tmp_path / "s.pth", tensors(shift=True), BASE, "v", made_of)
    assert [path.name for path in files] == ["s.pth", "s.rwkv-flow.pth"]
    assert list(torch.load(files[0], weights_only=True)) == [f"blocks.{i}.att.time_state" for i in range(3)]
    assert len(torch.load(files[1], weights_only=True)) == 9
    for path in files:
        record = file.read_record(path)
        assert (record.base_sha256, record.vocabulary_sha256, list(record.made_of)) == (BASE, "v", made_of)
        assert describe(path)["is"] == "an adapter of RWKV-Flow: a tuned state"
        assert state_lab.ingredient(read(path), 0.5).sha256 == sha256(path)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "s.rwkv-flow.pth").touch()
    with pytest.raises(InputError, match=r"s\.rwkv-flow\.pth: something is there already"):
        write(tmp_path / "s.pth", tensors(shift=True), None, None, ())
    assert not (tmp_path / "s.pth").exists()
    with pytest.raises(InputError, match=r"a state is written as \.pth"):
        write(tmp_path / "s.st", tensors(), None, None, ())


@pytest.mark.parametrize("ending", [".state", ".st"])
def test_one_of_ai00_is_turned_back(saved, ending):
    for name, x in saved(ending=ending).tensors.items():
        torch.testing.assert_close(x.float(), tensors()[name], rtol=1e-3, atol=1e-3)


def changed(change, shift=False):
    found = tensors(shift=shift)
    change(found)
    return found


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (changed(lambda x: x.pop("blocks.0.att.time_state")), "blocks.0.att.time_state: a state has the same parts"),
        (changed(lambda x: x.pop("blocks.1.att.ts_state"), True), "blocks.1.att.ts_state: a state has the same parts"),
        (changed(lambda x: x.update({"blocks.1.att.time_state": torch.zeros(4, 8, 4)})),
         r"is \(4, 8, 4\): must be \(4, 8, 8\)"),
        (changed(lambda x: x.update({"blocks.2.ffn.ts_state": torch.zeros(8)}), True), r"is \(8,\): must be \(32,\)"),
        ({"blocks.0.att.time_state": torch.zeros(4, 8)}, "must be heads, N, N"),
        ({"blocks.0.att.time_state": torch.zeros(4, 8, 4)}, "must be heads, N, N"),
        (changed(lambda x: x["blocks.1.att.time_state"].fill_(float("nan"))),
         "blocks.1.att.time_state: has a value that is no"),
        (changed(lambda x: x.update({"emb.weight": torch.zeros(4, 4)})), "has emb.weight: a state alone is taken"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_whole_state_is_refused(made, message, tmp_path):
    checkpoint.write(tmp_path / "s.pth", made)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "s.pth")


def test_one_that_was_tuned_beside_an_adapter_is_refused(tmp_path):
    config = LoraConfig(
        kind="lora", rank=2, alpha=2.0, rank_stabilized=False, dropout=0.0, dora=False, targets=("att.key",), layers="all",
        also=(), state="wkv", load=None,
    )  # fmt: skip
    record = AdapterRecord(
        format=1, adapter=config, base_sha256=BASE, data_sha256=None, vocabulary_sha256=None, run=None
    )
    file.write(tmp_path / "a.pth", tensors() | {"blocks.0.att.key.lora_A": torch.zeros(2, 32)}, record)
    with pytest.raises(InputError, match=r"lora_A: what was trained|what was trained beside one.*merge it by"):
        read(tmp_path / "a.pth")


def test_a_model_is_no_state(tmp_path):
    checkpoint.write(tmp_path / "m.pth", make().state_dict())
    with pytest.raises(InputError, match="give a state's file"):
        read(tmp_path / "m.pth")
