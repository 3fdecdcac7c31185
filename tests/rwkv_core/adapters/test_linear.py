"""What holds for the layer of every method by itself: it is its merged matrix, and its gradients are right."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from rwkv_core.adapters import METHODS, attach, method
from rwkv_core.config import BatConfig, BoneConfig, LoraConfig, PissaConfig
from rwkv_core.quantize import Packed, QuantizedLinear

SOME = {"targets": ("att.x",), "layers": "all", "also": (), "state": "none", "load": None}
EXAMPLES = [
    (LoraConfig(kind="lora", rank=3, alpha=7.5, rank_stabilized=False, dropout=0.0, dora=False, **SOME), 12, 8),
    (LoraConfig(kind="lora", rank=9, alpha=2.0, rank_stabilized=True, dropout=0.0, dora=False, **SOME), 8, 12),
    (LoraConfig(kind="lora", rank=3, alpha=7.5, rank_stabilized=False, dropout=0.0, dora=True, **SOME), 12, 8),
    (PissaConfig(kind="pissa", rank=3, iterations=4, load_init=None, **SOME), 12, 8),
    (BoneConfig(kind="bone", rank=4, **SOME), 12, 8),
    (BoneConfig(kind="bone", rank=5, **SOME), 12, 8),
    (BoneConfig(kind="bone", rank=12, **SOME), 12, 20),
    (BatConfig(kind="bat", rank=4, **SOME), 12, 8),
    (BatConfig(kind="bat", rank=8, **SOME), 8, 24),
]
every_example = pytest.mark.parametrize(
    ("config", "into", "out"),
    EXAMPLES,
    ids=[f"{c.kind}{'-dora' * getattr(c, 'dora', False)}-r{c.rank}-{i}x{o}" for c, i, o in EXAMPLES],
)


def test_every_method_has_an_example():
    assert {config.kind for config, _, _ in EXAMPLES} == METHODS.keys() - {
        "peft"
    }  # whose layers are not ours: test_peft.py


def make(config, into, out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(into, out, bias=False, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(torch.randn(out, into, generator=generator, dtype=torch.float64))
    original = base.weight.detach().clone()
    layer = method(config)(base, config, generator)
    with torch.no_grad():
        for part in layer.PARTS:
            getattr(layer, part).add_(torch.randn(getattr(layer, part).shape, generator=generator, dtype=torch.float64))
    return layer, original


def parts(layer):
    return {name: getattr(layer, name).detach() for name in (*layer.PARTS, *layer.KEPT)}


@every_example
def test_is_its_merged_matrix(config, into, out):
    layer, weight = make(config, into, out)
    x = torch.randn(2, 5, into, dtype=torch.float64)
    merged = layer.merged(layer.frozen(weight, parts(layer), config), parts(layer), config)
    torch.testing.assert_close(layer(x), x @ merged.mT)
    assert layer(x).shape == (2, 5, out)


@every_example
def test_beside_a_packed_matrix_it_is_beside_the_unpacked_one(config, into, out):
    plain, original = make(config, into, out)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].att = nn.Module()
    model.blocks[0].att.x = QuantizedLinear(Packed(original, "nf4"))
    attach(model, config, seed=0)
    layer = model.blocks[0].att.x.double()
    with torch.no_grad():
        for name in layer.PARTS:
            getattr(layer, name).copy_(getattr(plain, name))
    weight = layer.weight
    x = torch.randn(2, 3, into, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ layer.merged(weight.unpacked(x.dtype), parts(layer), config).mT)
    assert gradcheck(lambda x, *_: layer(x), (x, *(getattr(layer, name) for name in layer.PARTS)))


@every_example
def test_gradients_are_those_of_finite_differences(config, into, out):
    layer, _ = make(config, into, out)
    trained = [getattr(layer, name) for name in layer.PARTS]
    x = torch.randn(2, 3, into, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: layer(x), (x, *trained))
    assert gradcheck(lambda *_: layer(x.detach()), trained)  # as in the first layer, whose input needs none
    assert not layer.weight.requires_grad


@every_example
def test_float32_and_bfloat16_are_close_to_float64(config, into, out):
    """As close as a merged matrix of that precision is, within a factor for the few more roundings."""
    layer, weight = make(config, into, out)
    x = torch.randn(64, into, dtype=torch.float64)
    dy = torch.randn(64, out, dtype=torch.float64)
    want = layer(x)
    want_grads = torch.autograd.grad(want, [getattr(layer, name) for name in layer.PARTS], dy)
    merged = layer.merged(layer.frozen(weight, parts(layer), config), parts(layer), config)
    for dtype in (torch.float32, torch.bfloat16):
        low = make(config, into, out, dtype)[0]
        with torch.no_grad():
            low.weight.copy_(layer.weight)
            for name in low.PARTS:
                getattr(low, name).copy_(getattr(layer, name))
        y = low(x.to(dtype))
        assert y.dtype == dtype
        plain = (x.to(dtype) @ merged.to(dtype).mT).double()
        limit = 4 * (plain - want).norm() + 4 * torch.finfo(dtype).eps * want.norm()
        assert (y.double() - want).norm() <= limit
        for got, true in zip(
            torch.autograd.grad(y, [getattr(low, n) for n in low.PARTS], dy.to(dtype)), want_grads, strict=True
        ):
            assert got.dtype == torch.float32
            assert (got.double() - true).norm() <= 8 * torch.finfo(dtype).eps * true.norm()


@every_example
def test_parts_of_other_shapes_are_refused(config, into, out):
    layer, weight = make(config, into, out)
    good = parts(layer)
    for name, x in good.items():
        for bad in (
            {k: v for k, v in good.items() if k != name},
            good | {name: x[..., 1:]},
            good | {name: x.t().contiguous()[None] if x.ndim < 3 else x.mT[None]},
        ):
            with pytest.raises(ValueError, match="it must be"):
                layer.merged(weight, bad, config)
    with pytest.raises(ValueError, match="it must be"):
        layer.merged(weight, good | {"more": good[layer.PARTS[0]]}, config)


@every_example
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_autocast_decides_the_precision_of_the_products(config, into, out, precision):
    layer, _ = make(config, into, out, torch.float32)
    with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
        y = layer(torch.randn(3, into))
    assert y.dtype == precision
    y.float().sum().backward()
    assert all(getattr(layer, name).grad.dtype == torch.float32 for name in layer.PARTS)
