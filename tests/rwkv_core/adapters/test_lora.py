import pytest
import torch
from torch import nn

from rwkv_core.adapters.lora import LoraLinear
from rwkv_core.config import LoraConfig


def config(rank=4, alpha=6.0, dropout=0.0, rank_stabilized=False):
    return LoraConfig(
        kind="lora", rank=rank, alpha=alpha, rank_stabilized=rank_stabilized, dropout=dropout, dora=False, targets=("x",),
        layers="all", also=(), state="none", load=None,
    )  # fmt: skip


def layer(**settings):
    lora = LoraLinear(nn.Linear(16, 12, bias=False), config(**settings), torch.Generator())
    nn.init.normal_(lora.lora_B)
    return lora


@pytest.mark.parametrize(("rank_stabilized", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_is_the_matrix_and_the_scaled_update(rank_stabilized, scale):
    lora, x = layer(rank_stabilized=rank_stabilized), torch.randn(5, 16)
    torch.testing.assert_close(lora(x), x @ lora.weight.T + scale * (x @ lora.lora_A.T) @ lora.lora_B.T)


def test_starts_as_published():
    base = nn.Linear(400, 12, bias=False)
    lora = LoraLinear(base, config(rank=8), torch.Generator())
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
