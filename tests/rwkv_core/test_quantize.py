import os
import subprocess
import sys
import typing

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.autograd import gradcheck

from rwkv_core import checkpoint, config, models, quantize
from rwkv_core.quantize import Form, Packed, QuantizedLinear, product, product_back

FORMS = [form for form in typing.get_args(Form) if form != "none"]
SHAPES = [(96, 64), (40, 112), (33, 47), (1, 1), (5, 256)]

every_form = pytest.mark.parametrize("form", FORMS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(*shape, seed=0):
    """Values of a matrix in training: most of them small, some rows much larger."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.02 * torch.rand(shape[0], 1, generator=generator).exp()


@pytest.fixture(params=["bitsandbytes", "torch"])
def unpacker(request, monkeypatch):
    """Both ways to unpack."""
    if request.param == "torch":
        monkeypatch.setattr(quantize, "_has_bitsandbytes", lambda device: False)
    else:
        assert quantize._has_bitsandbytes("cpu")
    return request.param


def levels(kind):
    """bitsandbytes' own."""
    return bnb.create_dynamic_map() if kind == "int8" else bnb.get_4bit_type(kind, device="cpu")


def slow(weight, kind):
    """Each stretch divided by its largest, each value to the nearest level: by looking at all of them."""
    block = quantize.BLOCKS[kind]
    out = []
    for stretch in weight.flatten().double().split(block):
        largest = stretch.abs().max()
        known = levels(kind).double()
        nearest = (stretch[:, None] / largest - known).abs().argmin(1)
        out.append(known[nearest] * largest)
    return torch.cat(out).view(weight.shape)


def error(got, weight):
    return float((got.double() - weight.double()).norm() / weight.double().norm())


@every_shape
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_each_value_becomes_the_nearest_level(kind, shape, unpacker):
    weight = matrix(*shape)
    got, want = Packed(weight, kind).unpacked(), slow(weight, kind)
    assert got.shape == weight.shape
    # where two levels are as near but for a rounding, either may be taken
    assert ((got.double() - weight).abs() <= (want - weight).abs() + 1e-6 * weight.abs()).all()
    assert (got.double() - want).abs().gt(1e-6 * weight.abs().max()).float().mean() < 0.01


@every_shape
@every_form
def test_both_ways_to_unpack_have_the_same_bits(form, shape, monkeypatch):
    packed = Packed(matrix(*shape), form)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = packed.unpacked(dtype)
        assert found.dtype == dtype
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "_has_bitsandbytes", lambda device: False)
            assert torch.equal(packed.unpacked(dtype), found)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_storage_is_bitsandbytes_own(kind):
    weight = matrix(96, 128)
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, blocksize=64)
    packed = Packed(weight, kind)
    assert torch.equal(packed.magnitudes, state.absmax)
    assert (packed.codes != codes[:, 0]).float().mean() < 0.001  # but for values in the middle of two levels
    assert torch.equal(packed.unpacked(), bnb.dequantize_4bit(packed.codes[:, None], state))


def test_storage_of_int8_is_bitsandbytes_own():
    weight = matrix(96, 128)
    codes, state = bnb.quantize_blockwise(weight, blocksize=256)
    packed = Packed(weight, "int8")
    assert torch.equal(packed.magnitudes, state.absmax)
    assert torch.equal(quantize._levels("int8", torch.device("cpu")), state.code)
    assert (packed.codes.view(96, 128) != codes).float().mean() < 0.005
    assert torch.equal(packed.unpacked(), bnb.dequantize_blockwise(packed.codes.view(96, 128), state))


@pytest.mark.parametrize("form", ["int8", "nf4", "nf4-double", "fp4", "fp4-double"])
@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_that_of_bitsandbytes(form, seed):
    """Per tensor, within 2 %."""
    weight = matrix(256, 128, seed=seed)
    if form == "int8":
        theirs = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=256))
    else:
        kind = form.removesuffix("-double")
        double = form.endswith("double")
        theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double))
    assert error(Packed(weight, form).unpacked(), weight) <= 1.02 * error(theirs, weight)


def test_the_error_of_fp8_is_half_a_step_of_its_fraction():
    weight = matrix(64, 512)
    got = Packed(weight, "fp8").unpacked()
    largest = weight.abs().amax(1, keepdim=True)
    step = torch.maximum(weight.abs() / 16, largest / 448 * 2.0**-10)  # three bits of fraction; subnormals
    assert ((got - weight).abs() <= step * 1.001).all()
    torch.testing.assert_close(got.abs().amax(1), largest[:, 0])


@every_form
def test_packed_bytes_are_those_of_the_format(form):
    rows, columns = 768, 3072
    bits = {"int8": 8 + 32 / 256, "nf4": 4 + 32 / 64, "fp4": 4 + 32 / 64, "fp8": 8 + 32 / columns,
            "int8-double": 8 + (8 + 32 / 256) / 256, "nf4-double": 4 + (8 + 32 / 256) / 64,
            "fp4-double": 4 + (8 + 32 / 256) / 64}[form]  # fmt: skip
    theory = rows * columns * bits / 8
    assert theory <= Packed(matrix(rows, columns), form).nbytes <= 1.02 * theory


@every_form
def test_zeros_stay_zeros(form, unpacker):
    weight = matrix(4, 256)
    weight[1] = 0
    assert torch.equal(Packed(weight, form).unpacked()[1], weight[1]) or "double" in form
    assert torch.equal(Packed(torch.zeros(8, 64), form).unpacked(), torch.zeros(8, 64))


@every_form
def test_what_is_no_number_is_seen(form):
    weight = matrix(4, 256)
    weight[2, 3] = float("nan")
    assert not Packed(weight, form).unpacked().isfinite().all()


@every_shape
@every_form
@pytest.mark.parametrize("tile", [1, 1000, 1 << 24])
def test_products_are_those_of_the_unpacked_matrix(form, shape, tile, monkeypatch):
    weight = matrix(*shape)
    whole = Packed(weight, form).unpacked(torch.float64)
    monkeypatch.setattr(quantize, "_TILE", tile)
    packed = Packed(weight, form)
    assert torch.equal(packed.unpacked(torch.float64), whole)
    x, dy = torch.randn(3, 2, shape[1], dtype=torch.float64), torch.randn(6, shape[0], dtype=torch.float64)
    torch.testing.assert_close(product(x, packed), x @ whole.mT)
    torch.testing.assert_close(product_back(dy, packed), dy @ whole)


@every_form
def test_a_layer_has_its_gradient_and_keeps_nothing_for_it(form):
    layer = QuantizedLinear(Packed(matrix(24, 32), form))
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(x).sum()
    assert not [y for y in kept if y.numel() > 1 and y.data_ptr() != x.data_ptr()]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16


@every_form
def test_a_module_that_changes_its_dtype_leaves_what_is_packed(form):
    layer = QuantizedLinear(Packed(matrix(24, 32), form))
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    for name, x in layer.state_dict().items():
        assert x.dtype == before[name].dtype
        assert torch.equal(x, before[name])
    assert {name.removeprefix("weight.") for name in before} <= {"codes", "magnitudes", "scale", "offset"}


@every_form
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_a_model_is_packed_as_it_is_loaded(form, version, random_model, tmp_path):
    plain = random_model(version=version)
    checkpoint.write(tmp_path / "m.pth", plain.state_dict())
    model = models.load(tmp_path / "m.pth", quantize=form)
    packed = {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    matrices = {
        name.removesuffix(".weight") for name, x in plain.state_dict().items()
        if name.endswith(".weight") and name.startswith("blocks") and x.ndim == 2
    }  # fmt: skip
    assert packed == matrices
    held = model.state_dict()
    for name, x in plain.state_dict().items():
        if name.removesuffix(".weight") in packed:
            assert not model.get_submodule(name).codes.requires_grad
            want = Packed(x, form)
            assert torch.equal(held[f"{name}.codes"].view(torch.uint8), want.codes.view(torch.uint8))
            x.copy_(want.unpacked())
        else:
            assert torch.equal(held[name], x)
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens)[0], plain.eval()(tokens)[0], rtol=1e-4, atol=1e-4)
    again = models.load(tmp_path / "m.pth", quantize=form)
    again.load_state_dict(held)
    assert all(torch.equal(x, held[name]) for name, x in again.state_dict().items())


def test_a_model_in_bfloat16_is_packed_from_its_own_values(random_model, tmp_path):
    checkpoint.write(tmp_path / "m.pth", random_model().state_dict(), "bf16")
    one, two = (models.load(tmp_path / "m.pth", dtype=x, quantize="nf4") for x in (torch.float32, torch.bfloat16))
    assert torch.equal(one.blocks[1].ffn.key.weight.codes, two.blocks[1].ffn.key.weight.codes)
    assert two.emb.weight.dtype == torch.bfloat16


MEASURE = """
import re, sys, threading, time
from pathlib import Path
import torch
from rwkv_core import models

def resident():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

models.load(Path(sys.argv[2]), quantize="nf4")  # what every first use takes
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = models.load(Path(sys.argv[1]), quantize="nf4")
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_model_is_never_whole_in_memory(random_model, tmp_path):
    """Of 200 MB of matrices, a fraction is in memory at a time."""
    large = random_model(n_layer=16, n_embd=512, head_size=64)
    checkpoint.write(tmp_path / "large.pth", large.state_dict())
    checkpoint.write(tmp_path / "small.pth", random_model(head_size=16).state_dict())
    size = (tmp_path / "large.pth").stat().st_size
    assert size > 180e6
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "large.pth"), str(tmp_path / "small.pth")]
    # one heap: what each thread's own keeps of freed memory depends on which of them comes first
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.45 * size


def test_the_settings_know_every_form():
    assert typing.get_args(config.ModelConfig.model_fields["quantize"].annotation) == typing.get_args(Form)
