import pytest
import torch
from parity import assert_parity
from sentinels import guard

from kernels import build
from kernels.block7 import NAMES, Parameters, block, block_reference, blocks

DTYPES = [torch.float32, torch.bfloat16]
NAMES_OUT = ("x", "v_first", "att_shift", "wkv", "ffn_shift")
# channels, head size, hidden channels, ranks of w, a, v, g
MODELS = [(16, 16, 48, (1, 2, 3, 4)), (32, 16, 100, (8, 6, 4, 10)), (128, 64, 512, (33, 20, 17, 64))]


def tensors(channels, size, hidden, ranks, dtype=torch.float32, layer_0=False, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / (
            shape[-1] ** 0.5 if len(shape) == 2 else 1
        )

    shapes = {
        "att.r_k": (channels // size, size),
        "ffn.key.weight": (hidden, channels),
        "ffn.value.weight": (channels, hidden),
    }
    for name in ("receptance", "key", "value", "output"):
        shapes[f"att.{name}.weight"] = (channels, channels)
    for name, rank in zip("wavg", ranks, strict=True):
        shapes |= {f"att.{name}1": (channels, rank), f"att.{name}2": (rank, channels)}
    norms = {f"{norm}.{kind}" for norm in ("ln1", "ln2", "att.ln_x") for kind in ("weight", "bias")}
    made = {
        name: randn(*shapes.get(name, (channels,) if name in norms else (1, 1, channels))).to(dtype) for name in NAMES
    }
    if layer_0:
        made = {name: x for name, x in made.items() if name not in ("att.v0", "att.v1", "att.v2")}
    return made


def inputs(rows, channels, size, dtype=torch.float32, layer_0=False, seed=2):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, v_first, att, ffn = (randn(rows, channels) for _ in range(4))
    wkv = randn(rows, channels // size, size, size, dtype=torch.float32)
    return [x, None if layer_0 else v_first, att, wkv, ffn]


def double(xs):
    return [None if x is None else x.double() for x in xs]


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr("kernels.block7.block_reference", lambda *_: pytest.fail("left to torch"))


@pytest.mark.parametrize("layer_0", [False, True], ids=["later", "layer 0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_matches_reference(model, rows, dtype, layer_0, compiled):
    given, xs = tensors(*model, dtype, layer_0), inputs(rows, *model[:2], dtype, layer_0)
    exact = block_reference(*double(xs), Parameters({name: x.double() for name, x in given.items()}))
    p = Parameters(given)
    for name, got, slow, truth in zip(NAMES_OUT, block(*xs, p), block_reference(*xs, p), exact, strict=True):
        assert got.dtype == slow.dtype
        assert_parity(name, got, slow, truth)


def test_activations_may_be_wider_than_parameters(compiled):
    """As when bfloat16 weights serve a float32 stream, for their size alone."""
    given, xs = tensors(*MODELS[1], torch.bfloat16), inputs(2, *MODELS[1][:2])
    want = block_reference(*xs, Parameters({name: x.float() for name, x in given.items()}))
    for got, y in zip(block(*xs, Parameters(given)), want, strict=True):
        torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_are_one_block_after_the_other(rows, dtype, compiled):
    model, layers = MODELS[1], 3
    given = [tensors(*model, dtype, layer_0=i == 0, seed=i) for i in range(layers)]
    xs = [inputs(rows, *model[:2], dtype, seed=i) for i in range(layers)]
    x, states = xs[0][0], [(att, wkv, ffn) for _, _, att, wkv, ffn in xs]

    def one_by_one(x, states, given):
        v_first, after = None, []
        for state, tensors in zip(states, given, strict=True):
            x, v_first, *state = block_reference(x, v_first, *state, Parameters(tensors))
            after.append(state)
        return x, after

    slow = one_by_one(x, states, given)
    exact = one_by_one(x.double(), [double(s) for s in states], [{n: y.double() for n, y in t.items()} for t in given])
    fast = blocks(x, states, [Parameters(t) for t in given])
    assert_parity("x", fast[0], slow[0], exact[0])
    for i, parts in enumerate(zip(fast[1], slow[1], exact[1], strict=True)):
        for name, *ys in zip(NAMES_OUT[2:], *parts, strict=True):
            assert_parity(f"{name} of block {i}", *ys)


def test_blocks_without_the_library(monkeypatch):
    model = MODELS[1]
    parameters = [Parameters(tensors(*model, layer_0=i == 0, seed=i)) for i in range(2)]
    xs = inputs(2, *model[:2])
    want = blocks(xs[0], [tuple(xs[2:])] * 2, parameters)
    monkeypatch.setattr(build, "library", lambda *_: None)
    got = blocks(xs[0], [tuple(xs[2:])] * 2, parameters)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    for ys, zs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(list(ys), list(zs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads, monkeypatch, compiled):
    p, xs = Parameters(tensors(*MODELS[2])), inputs(3, *MODELS[2][:2])
    want = block(*xs, p)
    monkeypatch.setattr(build, "threads", lambda: threads)
    for _ in range(5):
        assert all(torch.equal(y, w) for y, w in zip(block(*xs, p), want, strict=True))


@pytest.mark.parametrize("layer_0", [False, True], ids=["later", "layer 0"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_writes_all_and_nothing_past_the_ends(model, rows, layer_0, monkeypatch):
    given, xs = tensors(*model, layer_0=layer_0), inputs(rows, *model[:2], layer_0=layer_0)
    kept, p = double(xs), Parameters(given)
    check = guard(monkeypatch)
    block(*xs, p)
    assert check() == 3 + layer_0
    assert all(x is None or torch.equal(x.double(), y) for x, y in zip(xs, kept, strict=True))


def test_non_contiguous_inputs_are_read_right(compiled):
    p, xs = Parameters(tensors(*MODELS[1])), inputs(3, *MODELS[1][:2])
    strided = [torch.stack((x, x), -1)[..., 0] for x in xs]
    assert all(torch.equal(x, y) for x, y in zip(block(*strided, p), block(*xs, p), strict=True))


def test_gradients_are_the_reference_s():
    given = {name: x.double().requires_grad_() for name, x in tensors(*MODELS[0]).items()}
    xs = [x.requires_grad_() for x in double(inputs(2, *MODELS[0][:2]))]
    assert torch.autograd.gradcheck(lambda *xs: block(*xs, Parameters(given)), xs)
    assert torch.autograd.gradcheck(
        lambda *ps: block(*xs, Parameters(dict(zip(given, ps, strict=True))))[0], tuple(given.values()), fast_mode=True
    )
    trained = {name: x.float().detach() for name, x in given.items()}
    trained["ffn.x_k"].requires_grad_()
    xs = [x.float().detach() for x in xs]
    assert block(*xs, Parameters(trained))[0].requires_grad
    with torch.no_grad():
        assert not block(*xs, Parameters(trained))[0].requires_grad


def left_to_torch(xs, p):
    return all(torch.equal(x, y) for x, y in zip(block(*xs, p), block_reference(*xs, p), strict=True))


def test_the_rest_is_left_to_torch(monkeypatch):
    model = MODELS[1]
    given, xs = tensors(*model), inputs(2, *model[:2])
    assert left_to_torch(inputs(9, *model[:2]), Parameters(given))
    assert left_to_torch(double(xs), Parameters({name: x.double() for name, x in given.items()}))
    assert left_to_torch(inputs(2, 24, 8), Parameters(tensors(24, 8, 30, (1, 2, 3, 4))))
    wide = Parameters(given | {"att.key.weight": given["att.key.weight"].bfloat16()})
    assert left_to_torch(xs, wide)
    monkeypatch.setattr(build, "library", lambda *_: None)
    assert left_to_torch(xs, Parameters(given))


def test_sizes_that_disagree_reach_no_compiled_code():
    model = MODELS[1]
    for name in NAMES:
        given = tensors(*model)
        given[name] = torch.zeros(torch.Size(n + 16 for n in given[name].shape))
        assert not Parameters(given).fits, name


def test_parameters_know_when_they_were_moved():
    given = tensors(*MODELS[1])
    p = Parameters(given)
    assert p.unchanged()
    given["att.a0"].data = given["att.a0"].clone()
    assert not p.unchanged()


def test_missing_parameters_are_an_error():
    given = tensors(*MODELS[1])
    del given["att.k_a"]
    with pytest.raises(KeyError, match=r"att\.k_a"):
        Parameters(given)
