import json
import struct

import checkpoints
import pytest
import torch

from rwkv_core import checkpoint, models
from rwkv_core.errors import InputError, Problem
from rwkv_core.export import export
from rwkv_core.files import sha256
from rwkv_core.models.state import mount


@pytest.fixture
def model(random_model, tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.write(path, random_model(layer_0=True).state_dict(), "bf16")
    return path


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def read_safetensors(path):
    """By the format's definition: a length, a header in JSON, the bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F16", name
        start, end = entry["data_offsets"]
        values = struct.unpack(f"<{(end - start) // 2}e", data[8 + length + start : 8 + length + end])
        tensors[name] = torch.tensor(values, dtype=torch.float16).view(entry["shape"])
    return tensors, metadata


def test_st_is_laid_out_as_its_clients_read_it(model, out):
    """All float16, names in lower case, the pairs of low rank turned around."""
    report = export(model, out, ("st",), "as_loaded")
    tensors, metadata = read_safetensors(out / "model.st")
    source = checkpoint.read(model)
    assert metadata == {"format": "pt"}
    assert tensors.keys() == source.keys()
    turned = {"w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"}
    assert {name.split(".")[-1] for name, x in tensors.items() if x.shape != source[name].shape} == turned
    for name, x in source.items():
        want = x.to(torch.float16)
        assert torch.equal(tensors[name], want.T if name.split(".")[-1] in turned else want), name
    # what the clients derive the ranks from
    assert [tensors[f"blocks.1.att.{name}1"].shape[0] for name in "wavg"] == [8, 6, 4, 10]
    assert report["formats"]["st"]["file"] == "model.st"


def test_same_model_same_bytes(model, out, tmp_path):
    (tmp_path / "again").mkdir()
    one = export(model, out, ("st", "pth"), "fp16")
    assert export(model, tmp_path / "again", ("st", "pth"), "fp16") == one


@pytest.mark.parametrize("value", [65505.0, -7e4, float("inf"), float("nan")])
@pytest.mark.parametrize(("formats", "dtype"), [(("st",), "as_loaded"), (("pth",), "fp16")], ids=["st", "pth in fp16"])
def test_what_float16_cannot_hold_is_refused(formats, dtype, value, model, out, tmp_path):
    tensors = {name: x.float() for name, x in checkpoint.read(model).items()}
    tensors["blocks.1.ffn.key.weight"][3, 4] = value
    checkpoint.write(tmp_path / "large.pth", tensors)
    rule = "float16 ends at 65504; export pth in bf16 or fp32" if abs(value) < 1e9 else "all must be finite; this model"
    with pytest.raises(InputError, match=rf"blocks\.1\.ffn\.key\.weight has a value of .*: {rule}") as caught:
        export(tmp_path / "large.pth", out, formats, dtype)
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    assert list(out.iterdir()) == []


def test_a_model_with_nan_is_refused(model, out, tmp_path):
    tensors = dict(checkpoint.read(model))
    tensors["ln_out.weight"] = torch.full((32,), float("nan"))
    checkpoint.write(tmp_path / "nan.pth", tensors)
    with pytest.raises(InputError, match=r"ln_out\.weight has a value of nan"):
        export(tmp_path / "nan.pth", out, ("pth",), "as_loaded")


def test_the_largest_float16_is_kept(model, out, tmp_path):
    tensors = dict(checkpoint.read(model)) | {"ln_out.weight": torch.full((32,), 65504.0)}
    checkpoint.write(tmp_path / "large.pth", tensors)
    export(tmp_path / "large.pth", out, ("st", "pth"), "fp16")
    assert (checkpoint.read(out / "model.st")["ln_out.weight"] == 65504).all()


@pytest.mark.parametrize("dtype", ["as_loaded", "bf16", "fp16", "fp32"])
def test_pth_in_every_precision(dtype, model, out):
    receipt = export(model, out, ("pth",), dtype)
    assert receipt["merged"] == {"sha256": sha256(model)}
    report = receipt["formats"]["pth"]
    source, back = checkpoint.read(model), checkpoint.read(out / "model.pth")
    wanted = checkpoint.DTYPES.get(dtype, torch.bfloat16)
    assert [(n, x.shape, x.dtype) for n, x in back.items()] == [(n, x.shape, wanted) for n, x in source.items()]
    assert all(torch.equal(x.to(wanted), back[name]) for name, x in source.items())
    assert models.load(out / "model.pth").config == models.load(model).config
    assert report == {
        "file": "model.pth", "sha256": sha256(out / "model.pth"), "bytes": (out / "model.pth").stat().st_size,
        "tensors": len(source), "parameters": sum(x.numel() for x in source.values()),
        "largest_rounding": max(float((x.float() - back[n].float()).abs().max()) for n, x in source.items()),
        "flushed_to_zero": sum(int(((x != 0) & (back[n] == 0)).sum()) for n, x in source.items()),
    }  # fmt: skip


def test_what_vanishes_is_counted(model, out, tmp_path):
    tensors = {name: x.float() for name, x in checkpoint.read(model).items()}
    tensors["ln_out.weight"][:5] = 1e-9
    checkpoint.write(tmp_path / "small.pth", tensors)
    report = export(tmp_path / "small.pth", out, ("st", "pth"), "fp32")["formats"]
    before = sum(int(((x != 0) & (x.half() == 0)).sum()) for x in tensors.values())
    assert report["st"]["flushed_to_zero"] == before >= 5
    assert report["pth"]["flushed_to_zero"] == 0
    assert report["pth"]["largest_rounding"] == 0


def test_a_damaged_conversion_is_found(model, out, monkeypatch):
    """The file is read back, not trusted."""
    whole = checkpoint.read

    def damaged(change):
        def read(path):
            tensors = whole(path)
            if path.suffix == ".st":
                change(tensors)
            return tensors

        return read

    for change in (
        lambda t: t.pop("ln_out.bias"),
        lambda t: t["ln_out.bias"].mul_(1.01),
        lambda t: t.update({"ln_out.bias": t["ln_out.bias"][:3]}),
    ):
        monkeypatch.setattr(checkpoint, "read", damaged(change))
        with pytest.raises(Exception, match="report this as a defect"):
            export(model, out, ("st",), "as_loaded")


def test_what_web_rwkv_has_no_form_for_is_refused(out, tmp_path):
    checkpoint.write(tmp_path / "old.pth", checkpoints.official("5.0"))
    with pytest.raises(
        InputError, match=r"RWKV-5\.0, .*: web-rwkv reads neither, and takes them for others; export pth"
    ):
        export(tmp_path / "old.pth", out, ("st",), "as_loaded")
    assert list(out.iterdir()) == []


@pytest.fixture
def state(tmp_path):
    """A tuned state of the model, in all its parts."""
    generator = torch.Generator().manual_seed(2)
    parts = {"att.time_state": (4, 8, 8), "att.ts_state": (32,), "ffn.ts_state": (32,)}
    tensors = {
        f"blocks.{i}.{part}": 0.3 * torch.randn(shape, generator=generator)
        for i in range(3)
        for part, shape in parts.items()
    }
    checkpoint.write(tmp_path / "state.pth", tensors, "bf16")
    return tmp_path / "state.pth"


def test_a_state_is_written_for_each_client(model, state, out):
    """Without its token shift; what the .st's clients read has rows that are keys."""
    report = export(model, out, ("st", "pth"), "fp16", state)
    assert sorted(path.name for path in out.iterdir()) == ["model.pth", "model.st", "model.state", "state.pth"]
    assert report["merged"] == {"sha256": sha256(model), "state_sha256": sha256(state)}
    source = {name: x for name, x in torch.load(state).items() if name.endswith(".time_state")}
    back = torch.load(out / "state.pth", weights_only=True)
    assert [(name, x.dtype, x.is_contiguous()) for name, x in back.items()] == [
        (f"blocks.{i}.att.time_state", torch.bfloat16, True) for i in range(3)
    ]
    turned, metadata = read_safetensors(out / "model.state")
    assert metadata == {"format": "pt"}
    for name, x in source.items():
        assert torch.equal(back[name], x)
        assert torch.equal(turned[name], x.half().mT)
    for form, name in (("pth", "state.pth"), ("st", "model.state")):
        entry = report["formats"][form]["state"]
        assert (entry["file"], entry["sha256"], entry["tensors"]) == (name, sha256(out / name), 3)
        assert 0 <= entry["change_in_nats"] < 0.01
    mounted = models.load(model, dtype=torch.float32)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = [
            mounted(tokens, mount(mounted.initial_state(1), x))[0]
            for x in (source, back, checkpoint.read(out / "model.state"))
        ]
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-2, atol=1e-2)


def test_a_turned_state_is_found(model, state, out, monkeypatch):
    """What comes back is not only compared, but used: here by a model that is sure of itself."""
    tensors = checkpoint.read(model)
    checkpoint.write(model, tensors | {"head.weight": 10 * tensors["head.weight"]})
    export(model, out, ("st",), "as_loaded", state)
    whole = checkpoint.read

    def turned(path):
        tensors = whole(path)
        return {name: x.mT for name, x in tensors.items()} if path.name == "model.state" else tensors

    monkeypatch.setattr("rwkv_core.export._check", lambda source, back: {})
    monkeypatch.setattr(checkpoint, "read", turned)
    with pytest.raises(Problem, match=r"after the exported state a token changes by .* nats: rounding is less than"):
        export(model, out, ("st",), "as_loaded", state)
