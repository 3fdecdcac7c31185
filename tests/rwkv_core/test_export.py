import json
import struct
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import random_models
import torch
from safetensors.torch import load_file

from rwkv_core import checkpoint, models
from rwkv_core import export as core
from rwkv_core.config import FormatsConfig
from rwkv_core.errors import InputError, Problem
from rwkv_core.export import export_state
from rwkv_core.files import sha256
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.state import mount

ROOT = Path(__file__).parent.parent.parent


def export(model, out, formats, dtype, state=None, **more):
    """With the usual settings of what the formats don't name: float16 in a .gguf, a folder as the model is."""
    usual = {"gguf": ["f16"], "hf": {"dtype": "as_loaded", "part_gb": 5}}
    kinds = {key: more.pop(key) for key in ("gguf", "hf") if key in more}
    config = FormatsConfig.model_validate(usual | {"formats": formats, "dtype": dtype} | kinds)
    return core.export(model, out, config, state=state, **more)


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
    whole = checkpoint.each

    def damaged(change):
        def each(path):
            tensors = dict(whole(path))
            change(tensors)
            return iter(tensors.items())

        return each

    for change in (
        lambda t: t.pop("ln_out.bias"),
        lambda t: t.update(more=t["ln_out.bias"]),
        lambda t: t["ln_out.bias"].mul_(1.01),
        lambda t: t["blocks.2.att.key.weight"].neg_(),
        lambda t: t["emb.weight"][-1, -1:].add_(1),
        lambda t: t.update({"ln_out.bias": t["ln_out.bias"][:3]}),
    ):
        monkeypatch.setattr(checkpoint, "each", damaged(change))
        with pytest.raises(Problem, match="report this as a defect"):
            export(model, out, ("st",), "as_loaded")
    monkeypatch.setattr(checkpoint, "each", whole)
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
    mounted = models.load(model, dtype=torch.float32)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = [
            mounted(tokens, mount(mounted.initial_state(1), x))[0]
            for x in (source, back, checkpoint.read(out / "model.state"))
        ]
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-2, atol=1e-2)


WORLD = 65536


@pytest.fixture(scope="module", params=["6", "7"])
def world_model(request, tmp_path_factory):
    """Of World's vocabulary, and of more blocks than RWKV-6 adds up before it halves."""
    made = random_models.make(version=request.param, n_layer=7, n_embd=64, head_size=64, vocab_size=WORLD, layer_0=True)
    path = tmp_path_factory.mktemp("world") / "model.pth"
    checkpoint.write(path, made.state_dict(), "bf16")
    return path


ALL = ("pth", "st", "gguf", "hf")
FILES = {
    "pth": "model.pth", "st": "model.st", "hf": "hf",
    **{f"gguf-{form}": f"model-{form}.gguf" for form in ("f32", "f16", "bf16", "q8_0")},
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(world_model, tmp_path_factory):
    """Report and folder of every format at once."""
    out = tmp_path_factory.mktemp("exported")
    return export(world_model, out, ALL, "as_loaded", gguf=["f32", "f16", "bf16", "q8_0"]), out


def test_every_format_is_written_and_checked(world_model, exported):
    report, out = exported
    assert {name: entry["file"] for name, entry in report["formats"].items()} == FILES
    source = checkpoint.read(world_model)
    unused = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    for name, entry in report["formats"].items():
        path = out / entry["file"]
        assert entry["sha256"] == sha256(path)
        files = [path] if path.is_file() else list(path.iterdir())
        assert entry["bytes"] == sum(file.stat().st_size for file in files)
        kept = source.keys() - (unused if name.startswith(("gguf", "hf")) else set())
        back = checkpoint.read(path)
        assert back.keys() == kept
        change = {n: (back[n].float() - source[n].float()).abs().max() for n in kept}
        assert entry["largest_rounding"] == pytest.approx(max(map(float, change.values())), abs=1e-9)
        assert entry["flushed_to_zero"] == sum(int(((source[n] != 0) & (back[n] == 0)).sum()) for n in kept)
        assert (entry["largest_rounding"] == 0) == (name in ("pth", "hf", "gguf-f32", "gguf-bf16"))
        bound = 0.01 * max(float(x.abs().max()) for x in source.values())
        assert entry["largest_rounding"] < (bound if name == "gguf-q8_0" else 1e-3)


@pytest.mark.parametrize("form", FILES)
def test_every_format_goes_back(form, world_model, exported, out):
    """And is then, but for rounding and what nothing uses, the checkpoint that it was made of."""
    source = checkpoint.read(world_model)
    export(exported[1] / FILES[form], out, ("pth",), "bf16")
    back = checkpoint.read(out / "model.pth")
    exact = form not in ("st", "gguf-f16", "gguf-q8_0")
    assert [name for name in source if name in back] == list(back)
    assert len(source) - len(back) <= 3
    for name, x in back.items():
        if exact:
            assert torch.equal(x, source[name]), name
        else:
            far = (x.float() - source[name].float()).abs().max()
            assert far <= 0.01 * source[name].abs().max().float(), name
    models.load(out / "model.pth")


def test_a_gguf_as_loaded_is_of_one_dtype(exported, out):
    """Its matrices and all else are of two, and no model computes in both."""
    export(exported[1] / "model-f16.gguf", out, ("pth",), "as_loaded")
    assert {x.dtype for x in checkpoint.read(out / "model.pth").values()} == {torch.float32}
    assert models.load(exported[1] / "model-f16.gguf", dtype=torch.float32).config.n_layer == 7


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6", "7"])
def test_every_version_in_every_format_that_has_it(version, out, tmp_path):
    """As the clients have it: who has none, says so."""
    made = random_models.make(version=version, n_embd=64, head_size=1 if version == "4" else 64, vocab_size=96)
    checkpoint.write(tmp_path / "model.pth", made.state_dict())
    for form in ("pth", "st", "hf"):
        refused = (form == "st" and version in ("5.0",)) or (form == "hf" and version.startswith("5"))
        if refused:
            with pytest.raises(InputError, match=r"RWKV-5"):
                export(tmp_path / "model.pth", out, (form,), "as_loaded")
            continue
        for dtype in ("as_loaded", "bf16", "fp16", "fp32"):
            report = export(tmp_path / "model.pth", out, (form,), dtype, hf={"dtype": dtype, "part_gb": 1e-5})
            back = checkpoint.read(out / report["formats"][form]["file"])
            wanted = torch.float16 if form == "st" else checkpoint.DTYPES.get(dtype, torch.float32)
            for name, x in made.state_dict().items():
                folded = (form, version, wanted) == ("hf", "6", torch.float16) and name.endswith(
                    "att.receptance.weight"
                )
                atol = 2**-22 if folded else 0  # an eighth of it was stored
                torch.testing.assert_close(back[name].to(wanted), x.to(wanted), rtol=0, atol=atol)
        assert models.load(out / report["formats"][form]["file"]).config.version == version
    with pytest.raises(InputError, match="gguf of a"):  # here of another vocabulary
        export(tmp_path / "model.pth", out, ("gguf",), "as_loaded")


@pytest.mark.parametrize(
    ("model", "formats", "more", "found"),
    [
        ({"n_layer": 1}, ("st",), {}, "st of an RWKV-7 of one layer: web-rwkv looks for a rank in the second"),
        ({"n_embd": 30, "head_size": 6}, ("st",), {}, "st of heads of 6: web-rwkv reads four channels at a time"),
        ({}, ("hf",), {}, "hf of heads of 8 that are divided by 8: fla has another epsilon in their norm; export pth"),
        ({"version": "6"}, ("hf",), {"head_size_divisor": 4.0}, "hf of heads of 8 that are divided by 4"),
        ({"head_size": 32, "vocab_size": WORLD}, ("gguf",), {}, "gguf of heads of 32"),
        ({}, ("gguf",), {"tokenizer": "bytes"}, "gguf of a model of the tokenizer bytes: llama.cpp has World's"),
        ({"n_embd": 64, "head_size": 64, "vocab_size": WORLD}, ("gguf",), {"special": {"x": 65530}}, "special token 'x'"),
    ],
)  # fmt: skip
def test_what_a_client_has_no_place_for_is_refused_before_any_work(model, formats, more, found, out, tmp_path):
    checkpoint.write(tmp_path / "model.pth", random_models.make(**model).state_dict())
    with pytest.raises(InputError, match=found) as caught:
        export(tmp_path / "model.pth", out, ("pth", *formats), "as_loaded", **more)
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("formats", ["pth", "st", "hf"])
def test_a_state_in_the_file_of_an_rwkv_7_is_refused(formats, model, out, tmp_path):
    tensors = checkpoint.read(model) | {"blocks.0.att.time_state": torch.zeros(4, 8, 8)}
    checkpoint.write(tmp_path / "both.pth", tensors)
    with pytest.raises(
        InputError, match=r"has blocks\.0\.att\.time_state: of RWKV-7 clients read a state from a file of its"
    ):
        export(tmp_path / "both.pth", out, (formats,), "as_loaded")


def test_a_state_for_each_engine_by_hand(state, out):
    """Runner's as it is, (H, V, K); Ai00's turned around in float16; fla's (1, H, K, V) in float32."""
    report = export_state(state, out, ("pth", "st", "hf"))
    source = {name: x for name, x in torch.load(state).items() if name.endswith(".time_state")}
    assert {entry["tensors"] for entry in report["formats"].values()} == {3}
    runner = torch.load(out / "state.pth", weights_only=True)
    ai00, _ = read_safetensors(out / "model.state")
    fla = load_file(out / "state.fla.safetensors")
    assert list(runner) == list(source)
    for i, (name, x) in enumerate(source.items()):
        of_fla = fla[f"model.layers.{i}.attn.recurrent_state"]
        assert of_fla.shape == (1, 4, 8, 8)
        assert of_fla.dtype == torch.float32
        for h in range(4):
            for value in range(0, 8, 3):
                for key in range(8):
                    number = x[h, value, key]
                    assert runner[name][h, value, key] == number
                    assert ai00[name][h, key, value] == number.half()
                    assert of_fla[0, h, key, value] == number
    for file in ("state.pth", "state.fla.safetensors"):
        back = checkpoint.read(out / file)
        assert all(torch.equal(back[name].float(), x.float()) for name, x in source.items())
    with pytest.raises(InputError, match="gguf of a state: its clients mount none"):
        export_state(state, out, ("gguf",))
    assert core.is_state(state)


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path):
    """A model of 200 MB in parts of 4 MB, and its state: as files are written and read back, some parts are in memory."""
    code = """
import sys
from pathlib import Path
from benchmarks.prepare import high_water
from rwkv_core import export
from rwkv_core.config import FormatsConfig
from rwkv_core.tokenizer import world
import gguf, safetensors.torch
world()
config = FormatsConfig.model_validate_json(sys.argv[3])
before = high_water("self")
export.export(Path(sys.argv[1]), Path(sys.argv[2]), config, state=Path(sys.argv[4]))
print(high_water("self") - before)
"""
    sizes = {"n_layer": 16, "n_embd": 512, "head_size": 64, "vocab_size": WORLD}
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in RWKV7(RWKV7.new_shape(**sizes)).state_dict().items()}
    about = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    checkpoint.write_each(
        tmp_path / "model.pth", about, (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes.values())
    )
    size, largest = (tmp_path / "model.pth").stat().st_size, WORLD * 512 * 2
    assert size > 2.4e8
    config = {"formats": ALL, "dtype": "bf16", "gguf": ["f16", "q8_0"], "hf": {"dtype": "as_loaded", "part_gb": 1}}
    (tmp_path / "out").mkdir()
    state = {f"blocks.{i}.att.time_state": torch.ones(8, 64, 64, dtype=torch.bfloat16) for i in range(16)}
    checkpoint.write(tmp_path / "state.pth", state)
    command = [sys.executable, "-c", code, *map(str, (tmp_path / "model.pth", tmp_path / "out")), json.dumps(config)]
    command.append(str(tmp_path / "state.pth"))
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 5 * largest  # a second copy of the model beside what is mapped would be more
