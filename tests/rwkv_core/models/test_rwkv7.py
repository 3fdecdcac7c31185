import math

import pytest
import torch

from benchmarks.train_step import lora
from kernels import build
from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach
from rwkv_core.errors import InputError
from rwkv_core.models.rwkv7 import RWKV7


def test_state_is_rows_of_values_by_columns_of_keys(random_model):
    """One token from nothing writes the outer product of its value and its key, whose shift and decay see zeros."""
    model = random_model(n_layer=1, n_embd=8, head_size=8)
    att = model.blocks[0].att
    with torch.no_grad():
        _, state = model(torch.tensor([[5]]))
        x = model.blocks[0].ln1(model.blocks[0].ln0(model.emb.weight[5]))
        k, v, a = (x * (1 - mix[0, 0]) for mix in (att.x_k, att.x_v, att.x_a))
        rate = torch.sigmoid(att.a0[0, 0] + a @ att.a1 @ att.a2)
        key = att.key(k) * (1 + (rate - 1) * att.k_a[0, 0])
        torch.testing.assert_close(state[0].wkv[0, 0], torch.outer(att.value(v), key))
    torch.testing.assert_close(state[0].att_shift[0], x)
    assert state[0].wkv.dtype == torch.float32


# One token at a time, where a block is one call of compiled code.


@pytest.fixture
def wide(random_model):
    """A model whose heads are of a size that the compiled block takes."""
    model = random_model(n_embd=32, head_size=16)
    with torch.no_grad():
        _, state = model(torch.arange(9)[None])
    return model, state


def one_token(model, state):
    with torch.no_grad():
        return model(torch.tensor([[5]]), state)[0]


def test_where_processes_share_parameters_a_token_goes_through_each_block(wide):
    """There a block's parameters are whole within it alone, and the other processes may read more tokens than one."""
    model, state = wide
    model.shared = True
    one_token(model, state)
    assert model._whole is None
    model.shared = False
    one_token(model, state)
    assert (model._whole is not None) is build.available("block7")


def by_torch(model, state):
    """With gradients wanted, no compiled code is used."""
    return model(torch.tensor([[5]]), state)[0].detach()


def change_in_place(model):
    model.blocks[1].att.key.weight.mul_(1.5)


def change_of_storage(model):
    model.blocks[1].att.w0.data = model.blocks[1].att.w0.data + 1


def change_of_parameter(model):
    model.blocks[1].ffn.key.weight = torch.nn.Parameter(1.5 * model.blocks[1].ffn.key.weight)


def change_of_all(model):
    model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()}, assign=True)


def adapter(model):
    attach(model, lora(2, ("ffn.key",), alpha=4), seed=0)
    model.blocks[1].ffn.key.lora_B.fill_(0.3)


def hook(model):
    model.blocks[1].att.output.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    "change", [change_in_place, change_of_storage, change_of_parameter, change_of_all, adapter, hook]
)
def test_one_token_follows_every_change_of_the_model(change, wide):
    model, state = wide
    before = one_token(model, state)
    with torch.no_grad():
        change(model)
    after = one_token(model, state)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, by_torch(model, state), rtol=1e-4, atol=1e-5)


def test_one_token_is_two_calls_of_compiled_code(wide, monkeypatch):
    """Without a compiler it is torch's operations, with the same result."""
    model, state = wide
    calls = []
    real = build.function
    monkeypatch.setattr(build, "function", lambda source, name, *rest: calls.append(name) or real(source, name, *rest))
    want = one_token(model, state)
    assert calls == (["rwkv_block7", "rwkv_linear"] if build.available("block7") else [])
    monkeypatch.setattr(build, "available", lambda *_: False)
    torch.testing.assert_close(one_token(model, state), want, rtol=1e-4, atol=1e-5)


# Initial values, each computed here from its formula.


@pytest.fixture(scope="module")
def fresh():
    model = RWKV7(RWKV7.new_shape(4, 32, 8, 100))
    model.initialize(torch.Generator().manual_seed(5))
    return model


def ranks_of(shape):
    return shape.decay_rank, shape.a_rank, shape.v_rank, shape.gate_rank


def test_new_shapes_follow_the_official_rule():
    ranks = {c: ranks_of(RWKV7.new_shape(2, c, 64, 100)) for c in (128, 768, 1024, 2048, 4096)}
    assert ranks == {
        128: (32, 32, 32, 64), 768: (64, 64, 32, 128), 1024: (64, 64, 64, 160), 2048: (128, 128, 64, 224),
        4096: (160, 160, 96, 320),
    }  # fmt: skip


@pytest.mark.parametrize("layer", range(4))
def test_initial_vectors(fresh, layer):
    att, ffn, c, n_layer, size = fresh.blocks[layer].att, fresh.blocks[layer].ffn, 32, 4, 8
    early, depth = 1 - layer / n_layer, layer / (n_layer - 1)
    for i in (0, 1, 9, 30, 31):
        zig = (i % size - 3.5) / 3.5
        zig *= abs(zig)
        line = i / 31 - 0.5
        want = {
            "x_r": 1 - (i / c) ** (0.2 * early), "x_w": 1 - (i / c) ** (0.9 * early),
            "x_k": 1 - (i / c) ** (0.7 * early), "x_v": 1 - (i / c) ** (0.7 * early),
            "x_a": 1 - (i / c) ** (0.9 * early), "x_g": 1 - (i / c) ** (0.2 * early),
            "w0": -6 + 6 * (i / 31) ** (1 + depth**0.3) + 0.5 + 2.5 * zig,
            "a0": -0.19 + 0.3 * zig + 0.4 * line,
            "k_k": 0.71 - 0.1 * line,
            "k_a": 1.02,
        }  # fmt: skip
        if layer > 0:
            want["v0"] = 0.73 - 0.4 * line
        for name, value in want.items():
            assert getattr(att, name)[0, 0, i].item() == pytest.approx(value, abs=1e-6), name
        assert ffn.x_k[0, 0, i].item() == pytest.approx(1 - (i / c) ** (early**4), abs=1e-6)
    assert not hasattr(fresh.blocks[0].att, "v0")
    assert (att.r_k == -0.04).all()
    assert att.ln_x.weight.detach().numpy() == pytest.approx(((1 + layer) / n_layer) ** 0.7)
    assert (att.ln_x.bias == 0).all()


def gram(x):
    """x x' or x' x, whichever is smaller: gain squared times the unit matrix where x is orthogonal."""
    x = x.detach().double()
    return x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x


def test_initial_matrices(fresh):
    assert fresh.emb.weight.abs().max() <= 1e-4
    assert fresh.emb.weight.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.05)
    orthogonal = {"head.weight": 0.5 * math.sqrt(100 / 32)}
    for i, block in enumerate(fresh.blocks):
        orthogonal |= {f"blocks.{i}.att.receptance.weight": 1, f"blocks.{i}.att.key.weight": 0.1}
        orthogonal |= {f"blocks.{i}.att.value.weight": 1, f"blocks.{i}.ffn.key.weight": 1}
        for name in "wagv":
            if hasattr(block.att, f"{name}2"):
                rows, columns = getattr(block.att, f"{name}2").shape
                orthogonal[f"blocks.{i}.att.{name}2"] = 0.1 * max(1, math.sqrt(rows / columns))
                assert (getattr(block.att, f"{name}1") == 0).all()
        assert (block.att.output.weight == 0).all()
        assert (block.ffn.value.weight == 0).all()
    values = dict(fresh.named_parameters())
    for name, gain in orthogonal.items():
        want = gain**2 * torch.eye(min(values[name].shape), dtype=torch.float64)
        torch.testing.assert_close(gram(values[name]), want, rtol=1e-4, atol=1e-5, msg=name)
    for name, x in values.items():
        if ".ln" in name and "ln_x" not in name:
            assert (x == (1 if name.endswith("weight") else 0)).all(), name


def test_head_gain_for_a_small_vocabulary():
    model = RWKV7(RWKV7.new_shape(1, 32, 8, 20))
    model.initialize(torch.Generator().manual_seed(5))
    torch.testing.assert_close(gram(model.head.weight), 0.25 * torch.eye(20, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_initial_values_follow_the_seed():
    def values(seed):
        model = RWKV7(RWKV7.new_shape(2, 16, 8, 20))
        model.initialize(torch.Generator().manual_seed(seed))
        return model.state_dict()

    one, same, other = values(5), values(5), values(6)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_parameter_groups(tiny):
    names = {id(p): name for name, p in tiny.named_parameters()}
    decayed, plain, fast = tiny.parameter_groups(1e-3, 0.1)
    groups = [{names[id(p)] for p in group["params"]} for group in (decayed, plain, fast)]
    large = {"emb.weight", "head.weight"} | {
        f"blocks.{i}.{name}.weight"
        for i in range(3)
        for name in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    }
    assert groups == [large, names_of(tiny) - large - w0(tiny), w0(tiny)]
    assert [(g["lr"], g["weight_decay"]) for g in (decayed, plain, fast)] == [(1e-3, 0.1), (1e-3, 0), (2e-3, 0)]
    tiny.emb.requires_grad_(False)
    assert "emb.weight" not in {names[id(p)] for g in tiny.parameter_groups(1e-3, 0.1) for p in g["params"]}


def names_of(model):
    return {name for name, _ in model.named_parameters()}


def w0(model):
    return {name for name in names_of(model) if name.endswith(".att.w0")}


# Loading.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ffn.key.weight"), r"lacks blocks\.1\.ffn\.key\.weight: .*; give a whole checkpoint"),
        (lambda t: t.pop("blocks.0.att.w1"), "lacks 'blocks.0.att.w1': a RWKV7 has it"),
        (lambda t: t.pop("blocks.2.att.v1"), r"lacks blocks\.2\.att\.v1"),
        (lambda t: t.pop("emb.weight"), "emb.weight"),
        (lambda t: t.update({"blocks.0.att.extra": torch.zeros(2)}), r"has the unknown blocks\.0\.att\.extra"),
        (lambda t: t.update({"ln_out.bias": torch.zeros(31)}), r"has of a wrong shape ln_out\.bias"),
        (
            lambda t: t.update({"blocks.0.att.r_k": torch.zeros(4, 9)}),
            r"r_k is \(4, 9\); its heads must share the 32 channels",
        ),
    ],
)
def test_load_refuses_what_is_not_whole(change, message, tiny, tmp_path):
    path = tmp_path / "model.pth"
    tensors = dict(tiny.state_dict())
    change(tensors)
    checkpoint.write(path, tensors)
    with pytest.raises(InputError, match=message):
        models.load(path)
