"""Models as they are used: with an adapter beside their matrices, packed, after a state; loaded only when it must be."""

import numpy as np
import pytest
import torch

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, trained_state
from rwkv_core.adapters.file import AdapterRecord, write
from rwkv_core.adapters.linear import AdaptedLinear
from rwkv_core.config import LoraConfig, PissaConfig
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.errors import InputError
from rwkv_core.evaluation.measure import Items
from rwkv_core.evaluation.store import Store
from rwkv_core.evaluation.subject import Subject
from rwkv_core.files import sha256
from rwkv_core.generation.sampling import Sampling
from rwkv_core.merge import Part, merge
from rwkv_core.quantize import Packed, rounded
from rwkv_core.tokenizer import named

SIZES = {"ctx_len": 16, "batch": 4}
BYTES = named("bytes", {})
LORA = LoraConfig(
    kind="lora", rank=2, alpha=4, rank_stabilized=False, dropout=0.0, dora=False, targets=("att.*", "ffn.*"), layers="all",
    also=("ln_out.*", "head.weight[0 65-90]"), state="none", load=None,
)  # fmt: skip
PISSA = PissaConfig(
    kind="pissa", rank=2, iterations=4, targets=("ffn.*",), layers="all", also=(), state="none", load=None,
    load_init=None,
)  # fmt: skip


@pytest.fixture
def documents(tmp_path):
    draw, writer = np.random.default_rng(0), Writer(tmp_path / "text")
    for size in (3, 40, 17, 1, 8, 30):
        writer.add([*draw.integers(1, 256, size).tolist(), 0])
    writer.close()
    return Documents(tmp_path / "text")


@pytest.fixture
def base(tmp_path, random_model):
    checkpoint.write(tmp_path / "base.pth", random_model(vocab_size=256).state_dict())
    return tmp_path / "base.pth"


def adapter(base, config, quantize="none"):
    """Trained on the base: every part of it random."""
    model = models.load(base, quantize=quantize)
    attach(model, config, 0, originals=checkpoint.read(base) if quantize != "none" else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    path = base.with_name(f"{config.kind}.pth")
    about = AdapterRecord(
        format=1, adapter=config, quantize=quantize, base_sha256=sha256(base), data_sha256=None, vocabulary_sha256=None,
        run=None,
    )  # fmt: skip
    write(path, trained_state(model), about)
    return path


def nats(subject, documents):
    return subject.score(documents, **SIZES).nats


@pytest.mark.parametrize("config", [LORA, PISSA], ids=["lora", "pissa"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_that_is_not_merged_scores_as_the_merged_model(config, quantize, base, documents):
    """Beside a packed base, as the merge of what it learned beside the rounded one. And it is not merged."""
    path = adapter(base, config, quantize)
    merged = base.with_name("merged.pth")
    merge(base, [Part(path)], merged)
    subject = Subject(base, BYTES, adapter=path)
    whole, plain = (nats(Subject(file, BYTES), documents) for file in (merged, base))
    np.testing.assert_allclose(nats(subject, documents), whole, rtol=2e-5)
    assert np.abs(whole - plain).max() > 0.1
    adapted = [m for m in subject.model.modules() if isinstance(m, AdaptedLinear)]
    assert adapted
    assert all(isinstance(m.weight, Packed) == (quantize != "none") for m in adapted)


def test_an_adapter_may_be_tried_beside_another_packing(base, documents):
    path = adapter(base, LORA)
    packed = Subject(base, BYTES, adapter=path, quantize="int8")
    assert packed.about["quantize"] == "int8"
    assert 1e-4 < np.abs(nats(packed, documents) - nats(Subject(base, BYTES, adapter=path), documents)).max() < 1


def test_a_packed_base_scores_as_its_rounded_values(base, documents):
    tensors = checkpoint.read(base)
    matrices = [
        name for name, x in tensors.items() if name.startswith("blocks.") and name.endswith(".weight") and x.ndim == 2
    ]
    checkpoint.write(
        base.with_name("rounded.pth"), {n: rounded(x, "nf4") if n in matrices else x for n, x in tensors.items()}
    )
    packed = Subject(base, BYTES, quantize="nf4")
    np.testing.assert_allclose(
        nats(packed, documents), nats(Subject(base.with_name("rounded.pth"), BYTES), documents), rtol=1e-5
    )
    assert sum(isinstance(m, Packed) for m in packed.model.modules()) == len(matrices)
    assert np.abs(nats(packed, documents) - nats(Subject(base, BYTES), documents)).max() > 0.01


@pytest.mark.parametrize("kind", ["wkv", "wkv and token shift"])
def test_an_adapter_s_state_is_that_of_the_file(kind, base, documents):
    """Documents begin from it, whose first token nothing predicts."""
    path = adapter(base, LORA.model_copy(update={"targets": ("att.*",), "state": kind, "also": ()}))
    merge(base, [Part(path)], base.with_name("merged.pth"), state=base.with_name("state.pth"))
    file = base.with_name("state.pth" if kind == "wkv" else "state.rwkv-flow.pth")
    one = Subject(base, BYTES, adapter=path)
    other = Subject(base.with_name("merged.pth"), BYTES, state=file)
    assert one.has_state
    assert other.has_state
    np.testing.assert_allclose(nats(one, documents), nats(other, documents), rtol=2e-5)
    np.testing.assert_array_equal(one.score(documents, **SIZES).tokens, documents.sizes - 1)
    sampling = Sampling(max_tokens=6, temperature=0, top_p=1, seed=0)
    assert one.texts(["ab", "c"], sampling, **SIZES) == other.texts(["ab", "c"], sampling, **SIZES)
    assert one.texts(["ab", "c"], sampling, **SIZES) != Subject(base, BYTES).texts(["ab", "c"], sampling, **SIZES)
    with pytest.raises(InputError, match="has a state of its own; give one of them"):
        Subject(base, BYTES, adapter=path, state=file)


def test_bf16_is_computed_in(base, documents):
    path = adapter(base, LORA)
    one, exact = (Subject(base, BYTES, adapter=path, dtype=dtype) for dtype in ("bf16", "fp32"))
    assert {p.dtype for p in one.model.parameters()} == {torch.bfloat16}
    np.testing.assert_allclose(nats(one, documents), nats(exact, documents), rtol=0.05)


def test_of_another_base_is_refused(base, documents, random_model):
    path = adapter(base, LORA)
    checkpoint.write(base, random_model(vocab_size=256, seed=1).state_dict())
    with pytest.raises(InputError, match="was trained on another base"):
        Subject(base, BYTES, adapter=path)


def test_what_is_known_costs_no_loading(base, documents, tmp_path, monkeypatch):
    """Scores, texts and other measures, with the same bytes; but not under another setting, or of another file."""
    sampling, store = Sampling(max_tokens=4, temperature=0, top_p=1, seed=0), Store(tmp_path / "store")
    facts = {"of": "something"}

    def all_of(subject, **changes):
        return (
            [column.tolist() for column in subject.score(documents, **(SIZES | changes))],
            subject.texts(["x"], sampling, **SIZES),
            {name: [x.total.tolist(), x.weight.tolist(), x.higher_is_better] for name, x in
             subject.measured(facts, lambda: {"a": Items(np.array([1.5]), np.array([2.0]), bool(subject.model))}).items()},
        )  # fmt: skip

    first = all_of(Subject(base, BYTES, store=store))
    assert first == all_of(Subject(base, BYTES))
    loads = []
    monkeypatch.setattr(models, "load", lambda *given, **options: loads.append(given) or pytest.fail("it is loaded"))
    assert all_of(Subject(base, BYTES, store=store)) == first
    for subject, changes in (
        (Subject(base, BYTES, store=store), {"ctx_len": 8}),
        (Subject(base, BYTES, store=store), {"skip_first": True}),
        (Subject(base, BYTES, store=store, dtype="bf16"), {}),
        (Subject(base, BYTES, store=store, quantize="nf4"), {}),
        (Subject(base, BYTES, store=store, head_size_divisor=4), {}),
        (Subject(base, BYTES, store=Store(tmp_path / "other")), {}),
    ):
        with pytest.raises(pytest.fail.Exception, match="it is loaded"):
            all_of(subject, **changes)
    assert len(loads) == 6
