"""Rows of tokens: only they learn, only they are kept, and all else is as if the whole matrix had been trained."""

import pytest
import torch
from methods import NEW

from kernels.head_loss import head_loss
from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.adapters.rows import without_unchanged
from rwkv_core.config import FullConfig, LoraConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge

TOKENS = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))  # 40 to 63 never occur
NAMES = ("emb", "head")


def config(*also):
    return FullConfig(kind="full", layers="all", also=also, **NEW)


ROWS = config("emb.weight[0-9 63]", "head.weight[5 60-63]")


@pytest.fixture
def base(tiny, tmp_path):
    checkpoint.write(tmp_path / "base.pth", tiny.state_dict())
    return tmp_path / "base.pth"


def loss(model, fused):
    if not fused:
        out, _ = model(TOKENS[:, :-1])
        return torch.nn.functional.cross_entropy(out.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    features, _ = model.features(TOKENS[:, :-1])
    rows, values = model.head.trained_rows()
    return head_loss(features.flatten(0, 1), model.head.now(), TOKENS[:, 1:].flatten(), rows=rows, values=values)


def learn(model, steps=3, weight_decay=0.1, fused=True):
    groups = model.parameter_groups(0.05, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.05, fused=True)
    for _ in range(steps):
        loss(model, fused).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(path, base, settings, tensors):
    about = {"format": 1, "adapter": settings, "base_sha256": sha256(base), "data_sha256": "", "vocabulary_sha256": ""}
    file.write(path, tensors, AdapterRecord(**about, run="r"))
    return Part(path)


@pytest.mark.parametrize("fused", [True, False])
def test_their_gradients_are_those_of_the_whole_matrix(fused, base):
    some, whole = models.load(base), models.load(base)
    attach(some, ROWS, 0)
    attach(whole, config("emb.weight", "head.weight"), 0)
    for model in (some, whole):
        loss(model, fused).backward()
    for name in NAMES:
        module = some.get_submodule(name)
        want = whole.get_submodule(name).weight.grad[module.rows]
        torch.testing.assert_close(module.values.grad, want, rtol=1e-4, atol=1e-5)
        assert want.abs().max() > 0.01
        assert module.weight.grad is None


def test_what_is_trained_is_as_small_as_they_are(base):
    model = models.load(base)
    attach(model, ROWS, 0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {"emb.values": (11, 32), "head.values": (5, 32)}
    assert trained_state(model)["emb.rows"].tolist() == [*range(10), 63]
    assert trained_state(model)["head.rows"].tolist() == [5, 60, 61, 62, 63]


@pytest.mark.parametrize("fused", [True, False])
def test_no_other_row_moves(fused, base):
    model = models.load(base)
    attach(model, ROWS, 0)
    learn(model, fused=fused)
    tensors = checkpoint.read(base)
    for name in NAMES:
        module = model.get_submodule(name)
        changed = (module.now() != tensors[f"{name}.weight"]).any(1).nonzero().squeeze(1).tolist()
        seen = (
            set(module.rows.tolist()) & set(TOKENS.flatten().tolist()) if name == "emb" else set(module.rows.tolist())
        )
        assert set(changed) == seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_puts_them_in(dtype, base, tmp_path):
    model = models.load(base, dtype=dtype)
    attach(model, ROWS, 0)
    learn(model)
    state = trained_state(model)
    receipt = merge(base, [save(tmp_path / "rows.pth", base, ROWS, state)], tmp_path / "merged.pth")
    assert receipt["merged"]["tensors_replaced"] == 2
    before, after = checkpoint.read(base), checkpoint.read(tmp_path / "merged.pth")
    for name, x in before.items():
        module = name.removesuffix(".weight")
        want = x.index_copy(0, state[f"{module}.rows"], state[f"{module}.values"]) if module in NAMES else x
        assert torch.equal(after[name], want)
    half = merge(base, [Part(tmp_path / "rows.pth", 0.5)], tmp_path / "half.pth")
    assert half["merged"]["tensors_replaced"] == 2
    halfway = checkpoint.read(tmp_path / "half.pth")["emb.weight"]
    torch.testing.assert_close(halfway, (before["emb.weight"] + after["emb.weight"]) / 2)


def test_an_embedding_trained_whole_is_saved_as_the_rows_that_changed(base, tmp_path):
    settings = config("emb.weight", "head.weight", "ln_out.*")
    model = models.load(base)
    attach(model, settings, 0)
    learn(model)
    state = trained_state(model)
    small = without_unchanged(state, lambda: checkpoint.read(base), torch.float32)
    assert list(small) == [
        "emb.rows",
        "emb.values",
        "ln_out.weight",
        "ln_out.bias",
        "head.weight",
    ]  # all of the head moves
    assert small["emb.rows"].tolist() == TOKENS[:, :-1].unique().tolist()
    attach(model := models.load(base), settings, 0)
    seen = TOKENS[:, :8].flatten().unique()
    with torch.no_grad():
        model.emb.weight[seen] += 1.0
    state = trained_state(model)
    small = without_unchanged(state, lambda: checkpoint.read(base), torch.float32)
    assert small["emb.rows"].tolist() == seen.tolist()
    assert torch.equal(small["emb.values"], state["emb.weight"][seen])
    assert len(small["head.rows"]) == 0
    assert small.keys() == {"emb.rows", "emb.values", "head.rows", "head.values", "ln_out.weight", "ln_out.bias"}
    for name, tensors in (("whole", state), ("small", small)):
        merge(base, [save(tmp_path / f"{name}.pth", base, settings, tensors)], tmp_path / f"{name}-merged.pth")
    assert (tmp_path / "whole-merged.pth").read_bytes() == (tmp_path / "small-merged.pth").read_bytes()
    attach(other := models.load(base), settings, 0, start=small)
    assert all(torch.equal(x, state[name]) for name, x in trained_state(other).items())


def test_a_row_that_a_load_in_bfloat16_rounded_has_not_changed(base):
    settings = config("emb.weight")
    attach(model := models.load(base, dtype=torch.bfloat16), settings, 0)
    with torch.no_grad():
        model.emb.weight[7] += 1.0
    small = without_unchanged(trained_state(model), lambda: checkpoint.read(base), torch.bfloat16)
    assert small["emb.rows"].tolist() == [7]


def test_tokens_that_do_not_occur_stay_as_they_were(base):
    """AdamW moves what has no gradient, if it decays."""
    attach(model := models.load(base), LoraConfig(
        kind="lora", rank=2, alpha=4, rank_stabilized=False, dropout=0.0, dora=False, targets=("att.key",), layers="all",
        also=("emb.weight",), **NEW,
    ), 0)  # fmt: skip
    learn(model, weight_decay=0.5)
    same = (model.emb.weight == checkpoint.read(base)["emb.weight"]).all(1)
    assert same[40:].all()
    assert not same[TOKENS[:, :-1].unique()].any()


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (("emb.weight[64]",), r"adapter.also: emb.weight has 64: the model's rows are 0 to 63"),
        (("head.weight[3-70]",), r"adapter.also: head.weight has 3-70: the model's rows are 0 to 63"),
        (("emb.weight[x]",), r"adapter.also: emb.weight has x"),
        (("emb.weight[1]", "emb.*"), r"adapter.also has emb.weight\[1\]: emb.weight is trained whole; leave one"),
        (("ln_out.weight[1]",), r"adapter.also has 'ln_out.weight\[1\]': each must match a parameter"),
    ],
)
def test_rows_that_can_not_be_trained_are_refused(also, message, tiny):
    with pytest.raises(InputError, match=message):
        attach(tiny, config(*also), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb.rows": None}, "emb: does not fit the base: has values; it must be rows and values"),
        ({"emb.values": None}, "emb: does not fit the base: has rows"),
        ({"emb.rows": torch.arange(12)}, "emb: does not fit the base: .* as many rows of 32"),
        ({"emb.rows": torch.arange(11).flip(0)}, "emb: .* must ascend within"),
        ({"emb.rows": torch.arange(54, 65)}, r"emb: .* must ascend within \[0, 64\)"),
        ({"emb.rows": torch.arange(-1, 10)}, r"emb: .* must ascend within \[0, 64\)"),
        ({"emb.rows": torch.arange(11)}, "emb: .* others than its settings say"),
        ({"emb.rows": None, "emb.values": None}, "emb: .* has nothing"),
        ({"ln_out.rows": torch.arange(3)}, "ln_out.rows: does not fit the base: the base has no such tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_a_file_whose_rows_do_not_fit_is_refused(changes, message, base, tmp_path):
    attach(model := models.load(base), ROWS, 0)
    tensors = {name: x for name, x in (trained_state(model) | changes).items() if x is not None}
    with pytest.raises(InputError, match=message):
        merge(base, [save(tmp_path / "rows.pth", base, ROWS, tensors)], tmp_path / "merged.pth")


def test_other_rows_are_not_gone_on_from(base):
    attach(model := models.load(base), ROWS, 0)
    with pytest.raises(InputError, match=r"adapter.load: emb.rows are other ones: these settings train others"):
        attach(
            models.load(base), config("emb.weight[0-8 10 63]", "head.weight[5 60-63]"), 0, start=trained_state(model)
        )
