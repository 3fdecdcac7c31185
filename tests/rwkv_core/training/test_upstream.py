"""Twenty steps of full training against RWKV-LM's recipe: a loop in plain torch, written from its formulas alone.

Of this project, the loop uses the model's logits, whose formulas have tests of their own. What is upstream's: the order of the
windows, the loss and L2Wrap, the groups, warm-up and course of the rate, clipping, and AdamW.
"""

import math
import random

import pytest
import torch
from random_models import make
from train_settings import train_config

from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.rows import rows
from rwkv_core.training.fit import fit
from rwkv_core.training.optimizers import groups

STEPS, BATCH, CTX, VOCABULARY = 20, 4, 12, 64
LR, FINAL, BETAS, EPS, CLIP, L2_WRAP = 3e-3, 3e-4, (0.9, 0.99), 1e-18, 1.0, 1e-2
"""Upstream's own, but for L2Wrap, which is 1e-4 there: twenty steps would hardly show a tenth of that."""

RECIPES = {
    "4": {"schedule": "exponential", "warmup_steps": 5, "warmup_from": 0.2, "weight_decay": 0.0},
    "5.2": {"schedule": "exponential", "warmup_steps": 5, "warmup_from": 0.2, "weight_decay": 0.01},
    "6": {"schedule": "cosine", "warmup_steps": 5, "warmup_from": 0.2, "weight_decay": 0.01},
    "7": {"schedule": "cosine", "warmup_steps": 5, "warmup_from": 0.01, "weight_decay": 0.1},
}
"""RWKV-LM's for its versions: 4 and 5 by steps, 6 and 7 by tokens to the end."""


@pytest.fixture
def data(tmp_path):
    draw, documents = random.Random(0), []
    for side, count in (("train", 150), ("valid", 5)):
        writer = Writer(tmp_path / side)
        for _ in range(count):
            first, size = draw.randrange(1, 40), draw.randrange(3, 20)
            documents.append([*range(first, first + size), 0])
            writer.add(documents[-1])
        writer.close()
    return tmp_path, [token for document in documents[:150] for token in document]


def window(number, tokens):
    """Its order of windows: cubes modulo the largest prime of the form 3n + 2 below their count, times a golden part of it."""
    slots = len(tokens) // CTX - 1
    prime = next(p for p in range(slots, 1, -1) if p % 3 == 2 and all(p % d for d in range(2, math.isqrt(p) + 1)))
    assert 0.9 < prime / (len(tokens) // CTX) <= 1
    offset = int(prime * (math.sqrt(5) - 1) / 2) * (number + 1) ** 3 % prime * CTX
    return tokens[offset : offset + CTX + 1]


def rate(recipe, step):
    w = recipe["warmup_steps"]
    if recipe["schedule"] == "exponential":
        progress = min(1, max(0, (step - w + 1) / (STEPS - w)))
        lr = LR * math.exp(math.log(FINAL / LR) * progress)
    else:  # the last step that it does is the one before the end that it counts to
        progress = min(1, max(0, (step - w) / (STEPS - 1 - w)))
        lr = LR * (0.5 + FINAL / LR / 2 + (0.5 - FINAL / LR / 2) * math.cos(math.pi * progress))
    return lr * (recipe["warmup_from"] + (1 - recipe["warmup_from"]) * step / w) if step < w else lr


def multiple(name):
    if name.endswith(("att.time_first",)):
        return 3
    return 2 if name.endswith(("att.time_decay", "att.w0")) else 1


class L2Wrap(torch.autograd.Function):
    """Nothing forward; backward, each position's largest logit is pulled down in proportion to it."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        largest, where = logits.max(-1, keepdim=True)
        pull = torch.zeros_like(logits).scatter_(-1, where, largest * L2_WRAP / (logits.shape[0] * logits.shape[1]))
        return grad, pull


def by_the_recipe(model, tokens, recipe):
    """Losses of the steps, and the norms of their gradients."""
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        batch = torch.tensor([window(step * BATCH + i, tokens) for i in range(BATCH)])
        logits, _ = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        L2Wrap.apply(loss, logits).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        losses.append(loss.item())
        norms.append(norm.item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is None:
                    continue
                g = p.grad * min(1, CLIP / (norm.item() + 1e-6))
                m, v = state[name]
                m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
                v.mul_(BETAS[1]).add_(g * g, alpha=1 - BETAS[1])
                lr = rate(recipe, step) * multiple(name)
                matrix = p.squeeze().ndim >= 2 and name.endswith(".weight")
                p.mul_(1 - lr * (recipe["weight_decay"] if matrix else 0))
                t = step + 1
                p.sub_(lr * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS))
    return losses, norms


def ours(folder, model, recipe, tmp_path, **changes):
    optimizer = recipe | {"lr": LR, "lr_final": FINAL, "betas": BETAS, "eps": EPS, "grad_clip": CLIP}
    config = train_config(
        ctx_len=CTX, rows="magic_prime", order="as_given", micro_batch=BATCH, epochs=None, steps=STEPS, l2_wrap=L2_WRAP,
        checkpoint_every=1000, validate_every=1000, optimizer=optimizer, **changes,
    )  # fmt: skip
    result = fit(
        model,
        groups(model, config.optimizer),
        rows(Documents(folder / "train"), config, 0),
        rows(Documents(folder / "valid"), config, None),
        config,
        seed=1,
        folder=tmp_path,
        log=lambda step, metrics: None,
    )
    history = [row for _, row in sorted(result.history["train"].items())]
    return [row["loss"] for row in history], [row["grad_norm"] for row in history], [row["lr"] for row in history]


@pytest.mark.parametrize("version", RECIPES)
def test_twenty_steps_are_upstream_s(version, data, tmp_path_factory):
    folder, tokens = data
    recipe = RECIPES[version]
    sizes = {"version": version, "n_layer": 2, "vocab_size": VOCABULARY}
    losses, norms, rates = ours(folder, make(**sizes), recipe, tmp_path_factory.mktemp("run"))
    want, want_norms = by_the_recipe(make(**sizes, op="reference"), tokens, recipe)
    assert rates == pytest.approx([rate(recipe, step) for step in range(STEPS)], rel=1e-9)
    assert losses == pytest.approx(want, rel=2e-6)
    assert norms == pytest.approx(want_norms, rel=2e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert max(want_norms) > CLIP
