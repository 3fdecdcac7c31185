import pytest
import torch
from torch import nn

from rwkv_core.adapters.lora import LoraLinear, delta
from rwkv_core.config import LoraConfig


def layer(dropout=0.0, rank=4, alpha=6.0):
    config = LoraConfig(kind="lora", rank=rank, alpha=alpha, dropout=dropout, targets=("x",))
    lora = LoraLinear(nn.Linear(16, 12, bias=False), config, torch.Generator())
    nn.init.normal_(lora.lora_B)
    return lora


def test_is_the_matrix_and_the_scaled_update():
    lora, x = layer(), torch.randn(5, 16)
    want = x @ lora.weight.T + 6 / 4 * (x @ lora.lora_A.T) @ lora.lora_B.T
    torch.testing.assert_close(lora(x), want)
    tensors = {"m.lora_A": lora.lora_A, "m.lora_B": lora.lora_B}
    config = LoraConfig(kind="lora", rank=4, alpha=6.0, dropout=0.0, targets=("x",))
    torch.testing.assert_close(x @ (lora.weight + delta(tensors, "m", config)).T, want)


def test_starts_as_published():
    base = nn.Linear(400, 12, bias=False)
    lora = LoraLinear(base, LoraConfig(kind="lora", rank=8, alpha=8, dropout=0, targets=("x",)), torch.Generator())
    assert (lora.lora_B == 0).all()
    assert lora.lora_A.abs().max() <= 400**-0.5
    assert lora.lora_A.std().item() == pytest.approx((400 * 3) ** -0.5, rel=0.05)
    assert lora.weight is base.weight
    assert not lora.weight.requires_grad


def test_dropout_acts_in_training_alone():
    lora, x = layer(dropout=0.5), torch.randn(5, 16)
    lora.eval()
    assert torch.equal(lora(x), lora(x))
    torch.testing.assert_close(lora(x), layer_without_dropout(lora, x))
    lora.train()
    torch.manual_seed(0)
    one = lora(x)
    assert not torch.allclose(one, lora(x))
    torch.manual_seed(0)
    assert torch.equal(lora(x), one)


def test_dropout_spares_the_base_and_keeps_the_mean():
    lora, x = layer(dropout=0.3), torch.randn(1, 16)
    lora.train()
    torch.manual_seed(0)
    mean = lora(x.expand(40_000, 16)).mean(0)
    torch.testing.assert_close(mean, layer_without_dropout(lora, x)[0], rtol=0.05, atol=0.05)
    with torch.no_grad():
        lora.lora_B.zero_()
    torch.testing.assert_close(lora(x), x @ lora.weight.T)


def layer_without_dropout(lora, x):
    return x @ lora.weight.T + lora.scale * (x @ lora.lora_A.T) @ lora.lora_B.T
