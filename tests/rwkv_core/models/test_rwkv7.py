import math
import os
import subprocess
import sys

import pytest
import torch
from parity import assert_parity

from kernels.head_loss import head_loss
from rwkv_core import checkpoint, models
from rwkv_core.errors import InputError
from rwkv_core.models.rwkv7 import RWKV7, BlockState, new_shape

OFFICIAL = """
import sys, torch
from rwkv.model import RWKV
stem, tokens = sys.argv[1], [int(t) for t in sys.argv[2].split(",")]
model = RWKV(model=stem, strategy="cpu fp32")
whole, state = model.forward(tokens, None, full_output=True)
one_by_one, after = [], None
for token in tokens:
    logits, after = model.forward([token], after)
    one_by_one.append(logits.clone())
torch.save({"whole": whole, "one_by_one": torch.stack(one_by_one), "state": state}, stem + ".out")
"""
"""The official inference package, in a process of its own: it sets switches of torch for the whole process."""


@pytest.mark.parametrize("layer_0", [False, True], ids=["without v0 in layer 0", "with v0 in layer 0"])
def test_equals_the_official_package(layer_0, random_model, tmp_path):
    model = random_model(n_embd=128, head_size=64, layer_0=layer_0)
    checkpoint.write(tmp_path / "model.pth", model.state_dict())
    tokens = torch.randint(1, 64, (37,), generator=torch.Generator().manual_seed(1)).tolist()
    subprocess.run(
        [sys.executable, "-c", OFFICIAL, str(tmp_path / "model"), ",".join(map(str, tokens))],
        env=os.environ | {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    official = torch.load(tmp_path / "model.out")
    model = models.load(tmp_path / "model.pth")
    with torch.no_grad():
        whole, state = model(torch.tensor([tokens]))
        one_by_one, after = [], None
        for token in tokens:
            logits, after = model(torch.tensor([[token]]), after)
            one_by_one.append(logits[0, 0])
    assert whole.std() > 0.1
    for ours in (whole[0], torch.stack(one_by_one)):
        for theirs in (official["whole"], official["one_by_one"]):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    for ours in (state, after):  # attention's shift, the WKV state with rows of values, channel mixing's shift
        for x, theirs in zip((part[0] for block in ours for part in block), official["state"], strict=True):
            torch.testing.assert_close(x, theirs, rtol=2e-4, atol=2e-5)


def test_slices_that_pass_the_state_on_equal_the_whole(tiny):
    tokens = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(1))
    exact = tiny.double()
    with torch.no_grad():
        want, want_state = exact(tokens, double_state(exact, 2))
        model = tiny.float()
        whole, whole_state = model(tokens)
        for length in (1, 7, 16, 49):
            out, state = [], None
            for piece in tokens.split(length, 1):
                logits, state = model(piece, state)
                out.append(logits)
            assert_parity(f"logits in slices of {length}", torch.cat(out, 1), whole, want)
            for got, ours, truth in zip(state, whole_state, want_state, strict=True):
                for name, *xs in zip(BlockState._fields, got, ours, truth, strict=True):
                    assert_parity(f"{name} in slices of {length}", *xs)


def double_state(model, batch):
    return [BlockState(*(x.double() for x in block)) for block in model.initial_state(batch)]


def test_rows_of_a_batch_do_not_meet(tiny):
    tokens = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together, _ = tiny(tokens)
        alone = torch.cat([tiny(row[None])[0] for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_no_position_sees_a_later_one(tiny):
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 12:] = (other[0, 12:] + 1) % 64
    with torch.no_grad():
        one, two = tiny(tokens)[0], tiny(other)[0]
    torch.testing.assert_close(one[:, :12], two[:, :12], rtol=1e-5, atol=1e-6)
    assert (one[:, 12:] - two[:, 12:]).abs().amax((0, 2)).min() > 1e-3


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


def test_initial_state_is_float32_for_a_bfloat16_model(tiny):
    model = tiny.bfloat16()
    state = model.initial_state(2)
    assert [x.dtype for x in state[0]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    with torch.no_grad():
        logits, after = model(torch.zeros(2, 20, dtype=torch.int64), state)
    assert logits.dtype == torch.bfloat16
    assert [x.dtype for x in after[0]] == [x.dtype for x in state[0]]


def gradients(model, tokens, double=False):
    model.zero_grad()
    logits, state = model(tokens, double_state(model, len(tokens)) if double else None)
    generator = torch.Generator().manual_seed(7)
    outputs = [logits, *(x for block in state for x in block)]
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    torch.autograd.backward(outputs, cotangents)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_of_the_whole_model(random_model):
    tokens = torch.randint(64, (2, 37), generator=torch.Generator().manual_seed(1))
    fast = gradients(random_model(op="torch"), tokens)
    slow = gradients(random_model(op="reference"), tokens)
    exact = gradients(random_model(op="reference").double(), tokens, double=True)
    assert fast.keys() == dict(random_model().named_parameters()).keys()
    for name in exact:
        assert exact[name].abs().max() > 0, name
        assert_parity(name, fast[name], slow[name], exact[name])


def test_gradient_follows_the_loss(tiny):
    """Along a random direction the loss changes as its gradient says, in float64."""
    model = tiny.double()
    tokens = torch.randint(64, (1, 25), generator=torch.Generator().manual_seed(1))

    def loss():
        features, _ = model.features(tokens[:, :-1], double_state(model, 1))
        logits = model.head(features.flatten(0, 1))
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")

    loss().backward()
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        with torch.no_grad():
            p += 1e-6 * direction
            above = loss()
            p -= 2e-6 * direction
            below = loss()
            p += 1e-6 * direction
        slope = (p.grad * direction).sum().item()
        assert (above - below).item() / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_head_loss_on_features_is_the_loss_of_the_logits(tiny):
    tokens = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(1))
    features, _ = tiny.features(tokens[:, :-1])
    logits, _ = tiny(tokens[:, :-1])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    got = head_loss(features.flatten(0, 1), tiny.head.weight, tokens[:, 1:].flatten())
    torch.testing.assert_close(got, want)


# Initial values, each computed here from its formula.


@pytest.fixture(scope="module")
def fresh():
    model = RWKV7(new_shape(4, 32, 8, 100))
    model.initialize(torch.Generator().manual_seed(5))
    return model


def test_new_shapes_follow_the_official_rule():
    ranks = {c: new_shape(2, c, 64, 100)[-5:-1] for c in (128, 768, 1024, 2048, 4096)}
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
    model = RWKV7(new_shape(1, 32, 8, 20))
    model.initialize(torch.Generator().manual_seed(5))
    torch.testing.assert_close(gram(model.head.weight), 0.25 * torch.eye(20, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_initial_values_follow_the_seed():
    def values(seed):
        model = RWKV7(new_shape(2, 16, 8, 20))
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


@pytest.fixture
def tensors(tiny):
    return tiny.state_dict()


def test_load_reads_what_the_file_says(tiny, tensors, tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.write(path, tensors, "bf16")
    model = models.load(path)
    assert model.config == tiny.config
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert list(model.state_dict()) == list(tensors)
    wide = models.load(path, dtype=torch.float32)
    assert all(torch.equal(x.bfloat16().float(), wide.state_dict()[name]) for name, x in tensors.items())
    assert all(p.requires_grad for p in wide.parameters())


def test_a_loaded_model_can_be_trained_without_touching_its_file(tensors, tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.write(path, tensors)
    before = path.read_bytes()
    model = models.load(path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ffn.key.weight"), r"lacks blocks\.1\.ffn\.key\.weight: .*; give a whole checkpoint"),
        (lambda t: t.pop("blocks.0.att.w1"), "'blocks.0.att.w1': an RWKV-7 checkpoint must have it"),
        (lambda t: t.pop("blocks.2.att.v1"), r"lacks blocks\.2\.att\.v1"),
        (lambda t: t.pop("emb.weight"), "emb.weight"),
        (lambda t: t.update({"blocks.0.att.extra": torch.zeros(2)}), r"has the unknown blocks\.0\.att\.extra"),
        (lambda t: t.update({"ln_out.bias": torch.zeros(31)}), r"has of a wrong shape ln_out\.bias"),
        (
            lambda t: t.update({"blocks.0.att.r_k": torch.zeros(4, 9)}),
            r"r_k is \(4, 9\): its heads must share the 32 channels",
        ),
    ],
)
def test_load_refuses_what_is_not_whole(change, message, tensors, tmp_path):
    path = tmp_path / "model.pth"
    tensors = dict(tensors)
    change(tensors)
    checkpoint.write(path, tensors)
    with pytest.raises(InputError, match=message):
        models.load(path)


OTHERS = {
    "RWKV-4": ["att.time_decay", "att.time_first", "att.time_mix_k", "att.key.weight", "ffn.time_mix_k"],
    "RWKV-5": ["att.time_decay", "att.time_faaaa", "att.time_mix_k", "att.gate.weight", "att.ln_x.weight"],
    "RWKV-6": ["att.time_maa_x", "att.time_maa_w1", "att.time_decay", "att.time_faaaa", "att.ln_x.weight"],
    "RWKV-7a": ["att.x_r", "att.r_k", "att.w1", "att.ln_x.weight", "ffn.s_emb.weight", "ffn.s1"],
    "RWKV-7b": ["att.x_r", "att.r_k", "att.w1", "att.ln_x.weight", "ffn.s_emb.weight", "qkv.q.weight"],
}


@pytest.mark.parametrize("version", OTHERS)
def test_load_names_the_version_that_it_refuses(version, tmp_path):
    path = tmp_path / "model.pth"
    names = ["emb.weight", *(f"blocks.0.{name}" for name in OTHERS[version]), "head.weight"]
    checkpoint.write(path, {name: torch.zeros(4, 4) for name in names})
    with pytest.raises(InputError, match=rf"is {version}\b.*must be RWKV-7 \(x070\); give an RWKV-x070 checkpoint"):
        models.load(path)


def test_load_names_what_is_no_rwkv(tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.write(path, {"transformer.wte.weight": torch.zeros(4, 4)})
    with pytest.raises(InputError, match=r"has no RWKV names \(transformer\.wte\.weight"):
        models.load(path)


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does(random_model):
    model = random_model(n_embd=128, head_size=64)
    tokens = torch.randint(0, model.config.vocab_size, (2, 77))
    wanted, wanted_state = model.double()(tokens, double(model.initial_state(2)))
    got, state = model.float().cuda()(tokens.cuda())
    torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-3, rtol=1e-3)
    for mine, theirs in zip(state, wanted_state, strict=True):
        torch.testing.assert_close(mine.wkv.cpu().double(), theirs.wkv.double(), atol=1e-3, rtol=1e-3)


def double(state):
    return [BlockState(*(part.double() for part in block)) for block in state]
