"""What is made again rather than kept: the same bits, less memory, nothing left behind."""

import pytest
import torch
from random_models import VERSIONS, make
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from benchmarks import train_step
from rwkv_core.adapters import attach
from rwkv_core.models.remake import Remake


def without(monkeypatch):
    monkeypatch.setattr(Remake, "__enter__", lambda self: self)


def gradients(model, mixed=False):
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits, state = model(tokens)
    loss = logits.float().square().mean() + sum(x.float().square().mean() for block in state for x in block)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("op", ["auto", "torch"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_are_the_same_bits(version, lora, op, mixed, monkeypatch):
    model = make(version=version, n_layer=2, op=op)
    if lora:
        attach(model, train_step.lora(3, ["att.*", "ffn.*"]), seed=0)
    got = gradients(model, mixed)
    without(monkeypatch)
    want = gradients(model, mixed)
    assert got.keys() == want.keys()
    assert len(got) >= 10
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


def test_gradients_under_checkpointing():
    model = make(n_layer=2)
    want = gradients(model)
    for block in model.blocks:
        block.forward = lambda *xs, forward=block.forward: checkpoint(forward, *xs, use_reentrant=False)
    assert all(torch.equal(grad, want[name]) for name, grad in gradients(model).items())


def test_a_layer_keeps_what_lean_means(monkeypatch):
    """On paper, in values of C for each token: x, r, k, v, the recurrence's output, x between the branches: 6, and 4 of the
    channel mix; a state of N / 64; what the low-rank pairs and LoRA have of their ranks."""
    monkeypatch.setattr(train_step, "VOCABULARY", 64)
    model = make(n_embd=128, head_size=64, n_layer=4)
    attach(model, train_step.lora(8, ["att.*", "ffn.*"]), seed=0)

    def kept():
        return sum(train_step.Step(model, 512).kept().values()) / (512 * 4 * 128 * 4)

    lean = 10 + 1 + (8 + 6 + 4 + 10 + 6 * 8) / 128
    assert lean < kept() < 1.05 * lean + 1  # layer 0 has its own norm, and the value of all
    without(monkeypatch)
    assert kept() > 22


class Counted:
    """A function that knows how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *xs):
        self.calls += 1
        return self.function(*xs)


X = torch.arange(1.0, 7.0).view(2, 3)


def test_made_once_for_all_who_ask_and_for_each_backward():
    x, make = X.clone().requires_grad_(), Counted(lambda x: (x * 2, x * 3))
    with Remake() as remake:
        y, z = remake(make, x)
        loss = (y**2).sum() + (y.view(3, 2) ** 3).sum() + (z[:, 1:] ** 2).sum()
    for calls in (2, 3):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert make.calls == calls
        want = 8 * X + 24 * X**2
        want[:, 1:] += 18 * X[:, 1:]
        torch.testing.assert_close(grad, want)


def test_a_chain_is_made_from_its_start():
    x, first, second = X.clone().requires_grad_(), Counted(lambda x, _: x * 2), Counted(lambda y: y.exp())
    with Remake() as remake:
        z = remake(second, remake(first, x, None))
        loss = (z**2).sum()
    memory = StorageWeakRef(z.untyped_storage())
    del z
    assert memory.expired()
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 4 * (4 * X).exp())
    assert (first.calls, second.calls) == (2, 2)


def test_nothing_is_left_after_the_backward():
    x = X.clone().requires_grad_()
    memories = []

    def make(x):
        y = x * 2
        memories.append(StorageWeakRef(y.untyped_storage()))
        return y

    with Remake() as remake:
        loss = (remake(make, x) ** 2).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    assert len(memories) == 2
    assert all(memory.expired() for memory in memories)


@pytest.mark.parametrize(
    "make",
    [lambda x: (x, x * 2), lambda x: (x.view(-1), x * 2), lambda x: (x * 2).unbind(), lambda x: ((y := x * 2), y[1:])],
    ids=["the input", "a view of it", "views of one", "a result and its view"],
)
def test_shared_memory_is_nobodys_alone(make):
    def loss(call):
        x = X.clone().requires_grad_()
        y, z = call(make, x)
        return torch.autograd.grad((y**2).sum() + (z**3).sum() + (x**2).sum(), x)

    with Remake() as remake:
        (got,) = loss(remake)
    assert torch.equal(got, loss(lambda make, x: make(x))[0])


def test_what_is_written_to_is_kept():
    x = X.clone().requires_grad_()
    with Remake() as remake:
        y = remake(torch.neg, x)
        y.add_(10)
        loss = (y**2).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], -2 * (10 - X))


def test_memory_of_another_is_not_mistaken():
    """Results that are freed within the context give their addresses to others."""
    x = torch.randn(1000, requires_grad=True)
    with Remake() as remake:
        total: Tensor = x.sum() * 0
        for i in range(50):
            remake(lambda x: x * 3, x)  # dropped at once
            total = total + ((x * float(i)) ** 2).sum()
    want = 2 * x.detach() * sum(i * i for i in range(50))
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], want)


def test_without_gradients_it_is_a_call():
    with torch.no_grad(), Remake() as remake:
        assert torch.equal(remake(torch.neg, X), -X)


def test_an_error_within_leaves_no_hooks():
    with pytest.raises(ZeroDivisionError), Remake():
        raise ZeroDivisionError
    y = X.clone().requires_grad_().exp()
    y.grad_fn._raw_saved_result.register_hooks(torch.clone, torch.clone)  # refused where there are some


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_a_whole_model_is_traced(version):
    """Torch.compile sees one graph, and no hooks."""
    model = make(version=version, n_layer=2)
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(logits):
        y = logits(tokens)
        return y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)

    def logits(tokens):
        return model(tokens)[0]

    got, want = (run(f) for f in (torch.compile(logits, backend="aot_eager", fullgraph=True), logits))
    for x, y in zip(got, want, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y)
