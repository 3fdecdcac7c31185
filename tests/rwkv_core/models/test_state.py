"""A tuned state: what a model begins from, and what training it needs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from parity import assert_parity
from random_models import VERSIONS

from kernels import block7
from rwkv_core import checkpoint
from rwkv_core.adapters import attach, trained_state
from rwkv_core.adapters.state import give
from rwkv_core.config import StateConfig
from rwkv_core.formats.tuned_state import PARTS, is_part
from rwkv_core.models import rwkv7
from rwkv_core.models.state import BlockState, mount

STATE = StateConfig(kind="state", state="wkv and token shift", layers="all", also=(), load=None)

every_version = pytest.mark.parametrize("version", [version for version in VERSIONS if version != "4"])

OFFICIAL = """
import json, os, sys
import torch
torch.set_num_threads(1)
from rwkv.model import RWKV

folder, name, tokens = json.load(sys.stdin)
tuned = torch.load(f"{folder}/{name}")
if os.environ["RWKV_V7_ON"] == "1":
    model = RWKV(f"{folder}/model", "cpu fp32")
    state = model.generate_zero_state()
    for i in range(len(tuned)):
        state[3 * i + 1] = tuned[f"blocks.{i}.att.time_state"].float().clone()
else:
    torch.save(torch.load(f"{folder}/model.pth") | tuned, f"{folder}/both.pth")
    model, state = RWKV(f"{folder}/both", "cpu fp32"), None
torch.save(model.forward(tokens, state, full_output=True)[0], f"{folder}/logits.out")
"""
"""The official inference package, in a process of its own: it sets switches of torch for the whole process."""


def tuned(model, scale=0.3):
    """The model, and a state of its shapes: every part of it random and given to it."""
    give(model, "wkv and token shift")
    state, generator = {}, torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_part(name):
                state[name] = p.normal_(0, scale, generator=generator)
    return model, state


@every_version
def test_a_model_begins_from_its_tuned_state(version, random_model):
    model, state = tuned(random_model(version=version))
    begin = model.initial_state(3)
    for i, block in enumerate(begin):
        for x, name in zip(block, ("att.ts_state", "att.time_state", "ffn.ts_state"), strict=True):
            assert torch.equal(x, state[f"blocks.{i}.{name}"].expand(x.shape))
    tokens = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], random_model(version=version)(tokens, begin)[0])
        other = random_model(version=version)(tokens)[0]
    assert (model(tokens)[0] - other).abs().amax((1, 2)).min() > 0.1
    assert len(state) == 9


@pytest.mark.parametrize("batch", [1, 3])
def test_the_compiled_token_begins_from_the_tuned_state(batch, random_model, monkeypatch):
    """And is compiled still."""
    model, _ = tuned(random_model(n_embd=64, head_size=16))
    tokens = torch.arange(batch)[:, None]
    used = []
    monkeypatch.setattr(rwkv7, "blocks", lambda *given: used.append(given) or block7.blocks(*given))
    with torch.no_grad():
        one = model(tokens)
    assert len(used) == 1
    assert model._whole.parameters
    with torch.enable_grad():
        other = model(tokens)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def in_double(state):
    return [BlockState(*(x.double() for x in block)) for block in state]


def of_state(model, tokens, *, state=None, dtype=torch.float32):
    """Gradients of the tuned state's parameters: of the loss of a batch that begins from it."""
    features, _ = model.features(tokens[:, :-1], state)
    logits = model.head(features).flatten(0, 1).to(dtype)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if is_part(name)}


@pytest.mark.parametrize("op", ["auto", "torch"])
@every_version
def test_gradient_of_a_tuned_state(version, op, random_model):
    """In float32, by each form, against the equations in float64; these against differences of the loss."""
    tokens = torch.randint(64, (3, 35), generator=torch.Generator().manual_seed(1))
    fast = of_state(tuned(random_model(version=version, op=op))[0], tokens)
    slow = of_state(tuned(random_model(version=version, op="reference"))[0], tokens)
    model = tuned(random_model(version=version, op="reference"))[0].double()
    parameters = {name: p for name, p in model.named_parameters() if is_part(name)}

    def begin():
        return mount(in_double(model.initial_state(3)), parameters)

    exact = of_state(model, tokens, state=begin(), dtype=torch.float64)
    assert fast.keys() == slow.keys() == exact.keys() == parameters.keys()
    for part in PARTS["wkv and token shift"]:  # judged together: the error of a few numbers is a matter of luck
        names = [name for name in exact if name.endswith(part)]
        assert_parity(part, *(torch.cat([grads[name].flatten() for name in names]) for grads in (fast, slow, exact)))

    def loss():
        with torch.no_grad():
            logits = model(tokens[:, :-1], begin())[0].flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()

    for name, p in parameters.items():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        with torch.no_grad():
            p += 1e-6 * direction
            above = loss()
            p -= 2e-6 * direction
            below = loss()
            p += 1e-6 * direction
        slope = (exact[name] * direction).sum().item()
        assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-6), name


@every_version
def test_a_tuned_state_is_float32_beside_a_model_in_bfloat16(version, random_model):
    model = random_model(version=version).bfloat16()
    attach(model, STATE, seed=0)
    grads = of_state(model, torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1)))
    assert {x.dtype for x in grads.values()} == {torch.float32}
    assert all(x.any() for x in grads.values())


@pytest.mark.parametrize("version", ["6", "7"])
def test_a_tuned_state_is_read_by_the_official_package(version, random_model, tmp_path):
    """The file that clients mount, after what training made of it, gives there the logits that it gives here.

    RWKV-6 of the package takes it out of the model's file, turned; RWKV-7 is handed it as the state of its first token.
    """
    model = random_model(version=version, n_layer=2, n_embd=64, head_size=32)
    checkpoint.write(tmp_path / "model.pth", model.state_dict())
    attach(model, STATE.model_copy(update={"state": "wkv"}), seed=0)
    tokens = torch.randint(1, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        of_state(model, tokens)
        optimizer.step()
        optimizer.zero_grad()
    state = trained_state(model)
    checkpoint.write(tmp_path / "state.pth", state)
    checkpoint.write(tmp_path / "turned.pth", {name: x.mT for name, x in state.items()})
    asked = tokens[0, :9].tolist()
    with torch.no_grad():
        wanted = model(tokens[:1, :9])[0][0]
    for name, same in (("state.pth", True), ("turned.pth", False)):
        subprocess.run(
            [sys.executable, "-c", OFFICIAL],
            env=os.environ
            | {"RWKV_V7_ON": str(int(version == "7")), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"},
            input=json.dumps([str(tmp_path), name, asked]),
            check=True,
            text=True,
            stdout=subprocess.DEVNULL,
        )
        found = torch.load(tmp_path / "logits.out")
        error = ((found - wanted).abs().max() / (wanted.max() - wanted.min())).item()
        assert error < 2e-5 if same else error > 1e-2, (name, error)
