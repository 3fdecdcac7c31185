"""Against the package that llama.cpp's own converter uses, and a block worked out by hand."""

import gguf
import pytest
import torch

from rwkv_core.formats import q8_0

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def drawn(seed: int) -> torch.Tensor:
    """Values of every size, zeros, halves that must go away from zero, and what is too small for the scale."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-10, 4, 64)[:, None]
    x[0] = 0
    x[1, :32] = torch.tensor([127.0, *(sign * (i + 0.5) for i in range(15) for sign in (1, -1)), 0.49999997])
    x[2, 40] = -0.0
    x[3] = 1e-9
    return x


@pytest.mark.parametrize("seed", range(5))
def test_the_bytes_are_those_of_the_package(seed):
    x = drawn(seed)
    packed = q8_0.pack(x)
    assert torch.equal(packed, torch.from_numpy(gguf.quants.quantize(x.numpy(), Q8_0)))
    assert torch.equal(q8_0.unpack(packed), torch.from_numpy(gguf.quants.dequantize(packed.numpy(), Q8_0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_packed_as_the_numbers_that_they_are(dtype):
    x = drawn(9).to(dtype)
    assert torch.equal(q8_0.pack(x), q8_0.pack(x.float()))


def test_a_block_by_hand():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([254.0, -3.0, 1.0, 0.9])  # the scale is 2: -1.5 and 0.5 are halves
    packed = q8_0.pack(x)
    assert packed.shape == (1, 34)
    assert packed[0, :2].view(torch.float16).item() == 2
    assert packed[0, 2:].view(torch.int8).tolist() == [127, -2, 1, 0] + [0] * 28
    assert q8_0.unpack(packed)[0, :4].tolist() == [254, -4, 2, 0]


@pytest.mark.parametrize("seed", range(3))
def test_no_value_is_further_away_than_it_says(seed):
    x = drawn(seed)
    change = (q8_0.unpack(q8_0.pack(x)) - x).abs()
    assert (change <= q8_0.error(x)).all()
    assert (change > 0.9 * q8_0.error(x)).any()  # nor is what it says idle
