"""Initial values and optimizer groups of RWKV-4, 5 and 6, each computed here from its formula; for 7 see test_rwkv7.py."""

import math

import pytest
import torch

from rwkv_core.models.rwkv4 import RWKV4
from rwkv_core.models.rwkv5 import RWKV5
from rwkv_core.models.rwkv6 import RWKV6

C, N, H, L, V = 64, 16, 4, 4, 100
F = 224  # 3.5 C, to a multiple of 32


@pytest.fixture(scope="module")
def fresh():
    models = {
        "4": RWKV4(RWKV4.new_shape(L, C, N, V)),
        "6": RWKV6(RWKV6.new_shape(L, C, N, V)),
        **{v: RWKV5(RWKV5.new_shape(L, C, N, V, version=v)) for v in ("5.0", "5.1", "5.2")},
    }
    for model in models.values():
        model.initialize(torch.Generator().manual_seed(5))
    return models


def expected_vectors(version, layer):
    """Values by parameter name, as functions of the channel, or of the head."""
    early, deep = 1 - layer / L, layer / (L - 1)
    at = lambda i: i / C  # noqa: E731
    zigzag = lambda i: ((i + 1) % 3 - 1) * 0.1  # noqa: E731
    old = {
        "att.time_mix_k": lambda i: at(i) ** early,
        "att.time_mix_v": lambda i: at(i) ** early + 0.3 * deep,
        "att.time_mix_r": lambda i: at(i) ** (0.5 * early),
        "ffn.time_mix_k": lambda i: at(i) ** early,
        "ffn.time_mix_r": lambda i: at(i) ** early,
    }
    by_channel = {
        "att.time_decay": lambda i: -6 + 5 * (i / (C - 1)) ** (0.7 + 1.3 * deep),
        "att.time_faaaa": lambda i: deep * (1 - i / (C - 1)) + zigzag(i),
    }
    by_head = {"att.time_decay": lambda h: -6 + 5 * (h / (H - 1)) ** (0.7 + 1.3 * deep)}
    match version:
        case "4":
            return old | {
                "att.time_decay": lambda i: -5 + 8 * (i / (C - 1)) ** (0.7 + 1.3 * deep),
                "att.time_first": lambda i: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            }
        case "5.0":
            return old | by_head | {"att.time_first": lambda h: -3.0}
        case "5.1":
            gate = {"att.time_mix_g": lambda i: at(i) ** (0.5 * early)}
            return old | gate | by_head | {"att.time_faaaa": lambda h: deep * (1 - h / (H - 1))}
        case "5.2":
            return old | {"att.time_mix_g": lambda i: at(i) ** (0.5 * early)} | by_channel
    return by_channel | {
        "att.time_maa_x": lambda i: 1 - at(i) ** early,
        "att.time_maa_w": lambda i: 1 - at(i) ** early,
        "att.time_maa_k": lambda i: 1 - at(i) ** early,
        "att.time_maa_v": lambda i: 1 - (at(i) ** early + 0.3 * deep),
        "att.time_maa_r": lambda i: 1 - at(i) ** (0.5 * early),
        "att.time_maa_g": lambda i: 1 - at(i) ** (0.5 * early),
        "ffn.time_maa_k": lambda i: 1 - at(i) ** (early**3),
        "ffn.time_maa_r": lambda i: 1 - at(i) ** (early**3),
    }


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6"])
def test_initial_vectors(version, layer, fresh):
    block = fresh[version].blocks[layer]
    seen = {"ln0", "ln1", "ln2"}
    for name, formula in expected_vectors(version, layer).items():
        values = block.get_parameter(name).detach().flatten().tolist()
        assert values == pytest.approx([formula(i) for i in range(len(values))], abs=1e-5), name
        seen.add(name)
    if version != "4":
        assert block.att.ln_x.weight.tolist() == pytest.approx([((1 + layer) / L) ** 0.7] * C)
        assert not block.att.ln_x.bias.any()
    rest = {n for n, p in block.named_parameters() if n not in seen and p.squeeze().ndim < 2 and not n.startswith("ln")}
    assert rest <= {"att.ln_x.weight", "att.ln_x.bias"}


MATRICES = {  # gains; 0 is a matrix of zeros
    "4": {"att.key": 0, "att.value": 1, "att.receptance": 0, "att.output": 0, "ffn.key": 2},
    "5.0": {"att.key": 1, "att.value": 1, "att.receptance": 1, "att.output": 0, "ffn.key": 2},
    "5.1": {"att.key": 1, "att.value": 1, "att.receptance": 1, "att.output": 0, "att.gate": 1, "ffn.key": 2},
    "5.2": {"att.key": 0.1, "att.value": 1, "att.receptance": 1, "att.output": 0, "att.gate": 0.1, "ffn.key": 1},
    "6": {"att.key": 0.1, "att.value": 1, "att.receptance": 1, "att.output": 0, "att.gate": 0.1, "ffn.key": 1},
}


@pytest.mark.parametrize("version", MATRICES)
def test_initial_matrices(version, fresh):
    model = fresh[version]
    assert model.emb.weight.abs().max() <= 1e-4
    gains = {"head": 0.5 * math.sqrt(V / C)}
    for i in range(L):
        gains |= {f"blocks.{i}.{name}": gain for name, gain in MATRICES[version].items()}
        gains |= {f"blocks.{i}.ffn.value": 0, f"blocks.{i}.ffn.receptance": 0}
    found = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 2 and ".weight" in name}
    assert found == gains.keys() | {"emb"}
    for name, gain in gains.items():
        x = model.get_parameter(f"{name}.weight").detach().double()
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        want = gain**2 * torch.eye(min(x.shape), dtype=torch.float64)
        torch.testing.assert_close(gram, want, rtol=1e-4, atol=1e-5, msg=name)


def test_initial_low_ranks_of_6(fresh):
    for block in fresh["6"].blocks:
        assert not block.att.time_maa_w1.any()
        assert not block.att.time_decay_w1.any()
        for up in (block.att.time_maa_w2, block.att.time_decay_w2):
            assert up.abs().max() <= 0.01
            assert up.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.1)


def test_new_shapes_follow_the_official_rules(fresh):
    assert {v: m.config.dim_ffn for v, m in fresh.items()} == {"4": 4 * C, "5.0": 4 * C, "5.1": 4 * C, "5.2": F, "6": F}
    ranks = {c: RWKV6.new_shape(2, c, 64, V) for c in (768, 4096)}
    assert {c: (s.mix_rank, s.decay_rank) for c, s in ranks.items()} == {768: (32, 64), 4096: (64, 128)}


FASTER = {
    "4": {"time_decay": 2, "time_first": 3},
    "5.0": {"time_decay": 2, "time_first": 3},
    "5.1": {"time_decay": 2},
    "5.2": {"time_decay": 2},
    "6": {"time_decay": 2},
}


@pytest.mark.parametrize("version", FASTER)
def test_parameter_groups(version, fresh):
    """Weight decay on the matrices named weight alone; two or three times the rate for decays and bonuses."""
    model = fresh[version]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"] / 1e-3, group["weight_decay"])
        for group in model.parameter_groups(1e-3, 0.1)
        for p in group["params"]
    }
    assert found.keys() == set(names.values())
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(FASTER[version].get(name.rsplit(".", 1)[1], 1)), name
        matrix = name.endswith(".weight") and "ln" not in name
        assert decay == (0.1 if matrix else 0), name
