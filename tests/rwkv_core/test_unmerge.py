"""What was put into a model is found again."""

import json
import zipfile

import pytest
import torch
from methods import EXAMPLES, OTHERS
from random_models import VERSIONS

from rwkv_core import checkpoint
from rwkv_core.adapters import attach, file, pissa, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge
from rwkv_core.unmerge import unmerge


@pytest.fixture
def tuned(random_model, tmp_path):
    """A base, and a model that an adapter of random values made of it."""

    def make(config, version="7", dtype="as_loaded", **sizes):
        model = random_model(version=version, **sizes)
        checkpoint.write(tmp_path / "base.pth", model.state_dict(), dtype)
        attach(model, config, seed=0)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: x + 0.1 * torch.randn(x.shape, generator=generator) if x.is_floating_point() else x
            for name, x in trained_state(model).items()
        }
        digest = sha256(tmp_path / "base.pth")
        record = AdapterRecord(
            format=1, adapter=config, base_sha256=digest, data_sha256="d", vocabulary_sha256="v", run="r"
        )
        file.write(tmp_path / "adapter.pth", tensors, record)
        merge(tmp_path / "base.pth", [Part(tmp_path / "adapter.pth")], tmp_path / "tuned.pth")
        return tmp_path / "base.pth", tmp_path / "tuned.pth", tmp_path / "found.pth"

    return make


def assert_merges_back(base, tuned, found, *, atol, rtol):
    again = found.with_name("again.pth")
    receipt = merge(base, [Part(found)], again)
    [entry] = receipt["adapters"]
    assert (entry["base_checked"], entry["run"]) == (True, None)
    want, got = checkpoint.read(tuned), checkpoint.read(again)
    assert list(got) == list(want)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")
    return got


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "config", [c for c in EXAMPLES + OTHERS if c.kind != "state"], ids=lambda c: f"{c.kind}-{c.layers}"
)
def test_what_has_no_higher_rank_is_found_whole(config, version, tuned):
    config = config.model_copy(update={"state": "none"})  # which is in no checkpoint
    if version == "4" and any("ln_x" in pattern for pattern in config.also):
        config = config.model_copy(update={"also": ("ln1.*",)})
    base, made, found = tuned(config, version)
    receipt = unmerge(base, made, found, rank=32)  # the models' width
    assert receipt["left_out"] < 1e-5
    assert_merges_back(base, made, found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lora_is_found_at_its_own_rank(version, tuned):
    [config] = [config for config in EXAMPLES if config.kind == "lora"]
    config = config.model_copy(update={"layers": "0 2", "also": ("ln1.*", "emb.weight")})
    base, made, found = tuned(config, version)
    receipt = unmerge(base, made, found, rank=3)
    tensors, record = file.read(found)
    assert (record.adapter.kind, record.adapter.rank, record.adapter.alpha) == ("lora", 3, 3.0)
    assert set(record.adapter.targets) == {"att.receptance", "att.value", *(f"ffn.{x}" for x in ffn(version))}
    assert (record.adapter.layers, set(record.adapter.also)) == ("0 2", {"emb.weight", "ln1.weight", "ln1.bias"})
    assert (record.base_sha256, record.data_sha256, record.run) == (sha256(base), None, None)
    assert torch.equal(tensors["emb.weight"], checkpoint.read(made)["emb.weight"])
    for name in receipt["left_out_of"]:
        module = name.removesuffix(".weight")
        a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # half of each singular value on each side
    assert receipt["left_out"] < 1e-5
    assert_merges_back(base, made, found, atol=1e-5, rtol=1e-5)


def ffn(version):
    return ("key", "value") if version == "7" else ("key", "value", "receptance")


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomised"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_large_matrices_are_found_by_a_randomised_decomposition(exact, dtype, tuned, monkeypatch):
    """To the base's rounding, and as well as by the exact one."""
    if exact:
        monkeypatch.setattr("rwkv_core.unmerge._SMALL", 10_000)
        monkeypatch.setattr("rwkv_core.unmerge.principal", None)
    else:
        monkeypatch.setattr("rwkv_core.unmerge.balanced", None)
    [config] = [config for config in EXAMPLES if config.kind == "lora"]
    base, made, found = tuned(config, dtype=dtype, n_layer=1, n_embd=320, head_size=64)
    receipt = unmerge(base, made, found, rank=3)
    rounding = 2**-8 if dtype == "bf16" else 1e-6
    assert receipt["left_out"] < (0.1 if dtype == "bf16" else 1e-5)
    assert_merges_back(base, made, found, atol=2 * rounding, rtol=2 * rounding)


@pytest.mark.parametrize("small", [256, 10], ids=["exact", "randomised"])
def test_what_a_rank_leaves_out_is_what_the_singular_values_say(small, tuned, monkeypatch):
    monkeypatch.setattr("rwkv_core.unmerge._SMALL", small)
    monkeypatch.setattr("rwkv_core.unmerge._SPARE", 2)
    [bone] = [config for config in EXAMPLES if config.kind == "bone"]
    base, made, found = tuned(bone.model_copy(update={"rank": 32}))
    receipt = unmerge(base, made, found, rank=2)
    start, end = checkpoint.read(base), checkpoint.read(made)
    left, whole = 0.0, 0.0
    for name, share in receipt["left_out_of"].items():
        values = torch.linalg.svdvals(end[name].double() - start[name].double()).square()
        assert share == pytest.approx(float(values[2:].sum() / values.sum()) ** 0.5, rel=0.01)
        left, whole = left + float(values[2:].sum()), whole + float(values.sum())
    assert 0.1 < receipt["left_out"] == pytest.approx((left / whole) ** 0.5, rel=0.01)
    with zipfile.ZipFile(found) as archive:
        assert archive.testzip() is None
    json.dumps(receipt)


def test_equal_files_are_equal_adapters(tuned, tmp_path):
    base, made, found = tuned(EXAMPLES[0])
    torch.manual_seed(1)
    unmerge(base, made, found, rank=3)
    torch.manual_seed(2)
    unmerge(base, made, tmp_path / "again.pth", rank=3)
    assert found.read_bytes() == (tmp_path / "again.pth").read_bytes()


def test_a_matrix_that_did_not_change_in_one_block_stays_as_it_was(tuned):
    base, made, found = tuned(EXAMPLES[0])
    start, end = checkpoint.read(base), checkpoint.read(made)
    name = "blocks.1.ffn.key.weight"
    checkpoint.write(made, end | {name: start[name]})
    receipt = unmerge(base, made, found, rank=3)
    assert receipt["left_out_of"][name] == 0
    got = assert_merges_back(base, made, found, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[name], start[name])


def test_a_base_in_another_precision(tuned):
    """What is only rounded, and not tuned, is a change too."""
    base, made, found = tuned(EXAMPLES[0])
    checkpoint.write(base, checkpoint.read(base), "bf16")
    start, end = checkpoint.read(base), checkpoint.read(made)
    name = "blocks.0.att.key.weight"
    checkpoint.write(made, end | {name: start[name].float()})
    receipt = unmerge(base, made, found, rank=32)
    assert receipt["left_out_of"][name] == 0
    assert len(receipt["left_out_of"]) == 18
    again = found.with_name("again.pth")
    merge(base, [Part(found)], again)
    for name, x in checkpoint.read(again).items():
        torch.testing.assert_close(x.float(), end[name], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"version": "6"}, "made.pth is an RWKV6: .*base.pth is an RWKV7: they must be equal; give the model"),
        ({"vocab_size": 65}, "made.pth has a vocabulary of 65: .*base.pth has a vocabulary of 64: they must"),
        ({"n_layer": 2}, "made.pth has this number of layers: 2: .*base.pth has this number of layers: 3: they"),
        ({"n_embd": 40}, r"made.pth has emb.weight \(64, 40\): .*base.pth has emb.weight \(64, 32\): they must"),
        (
            {"layer_0": True},
            r"made.pth has blocks.0.att.v\d \(.*\): .*base.pth has blocks.0.att.v\d nowhere: they must",
        ),
    ],
)
def test_models_of_other_shapes_are_refused(other, message, random_model, tmp_path):
    checkpoint.write(tmp_path / "base.pth", random_model().state_dict())
    checkpoint.write(tmp_path / "made.pth", random_model(**other).state_dict())
    with pytest.raises(InputError, match=message):
        unmerge(tmp_path / "base.pth", tmp_path / "made.pth", tmp_path / "found.pth", rank=2)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base.pth", "made.pth"]


def test_what_can_not_be_found_is_refused(tuned):
    base, made, found = tuned(EXAMPLES[0])
    with pytest.raises(InputError, match=r"--rank 33: .*blocks.0.att.receptance.weight is \(32, 32\): at most 32; say"):
        unmerge(base, made, found, rank=33)
    with pytest.raises(InputError, match=r"base.pth: its tensors are those of .*base.pth; give the one that was tuned"):
        unmerge(base, base, found, rank=2)
    with pytest.raises(InputError, match="it is read, and would be overwritten"):
        unmerge(base, made, made, rank=2)
    end = checkpoint.read(made)
    end["blocks.1.att.value.weight"] = end["blocks.1.att.value.weight"] * torch.nan
    checkpoint.write(made, end)
    with pytest.raises(InputError, match=r"blocks.1.att.value.weight: all values must be finite; this model is broken"):
        unmerge(base, made, found, rank=2)
    assert not found.exists()


def test_principal_part_of_a_matrix_of_that_rank_is_the_matrix():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    a, b = pissa.principal(x, 4, 2, seed=3)
    torch.testing.assert_close(b @ a, x, atol=1e-4, rtol=1e-4)
    assert a.shape == (4, 30)
