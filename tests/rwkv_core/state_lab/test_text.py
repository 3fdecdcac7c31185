"""A state from a text stands for the text: the continuation after it is that after the text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import train
from random_models import make

from rwkv_core import checkpoint, models, state_lab, warm_start
from rwkv_core.adapters import attach
from rwkv_core.config import StateConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.formats import tuned_state
from rwkv_core.models.state import mount, unmount
from rwkv_core.state_lab.text import as_read, from_text, of_text, without_shift
from rwkv_core.tokenizer import bytes_tokenizer

TOKENS = bytes_tokenizer()
TEXT, NEXT = "System: You answer in short.\n\n", "User: Why?\n\nAssistant:"
WITH_MATRIX = ("5.0", "5.1", "5.2", "6", "7")


@pytest.fixture(scope="module", params=WITH_MATRIX)
def model(request):
    return make(version=request.param, vocab_size=256).eval().requires_grad_(False)


def after(model, text):
    """Logits (T, V) of what follows the text, read from token 0 on."""
    ids = [0, *TOKENS.encode(text)]
    return model(torch.tensor([ids]))[0][0, -len(TOKENS.encode(NEXT)) :]


def after_file(model, path):
    """The same of NEXT alone, after the state in a file."""
    state = mount(model.initial_state(1), checkpoint.read(path))
    return model(torch.tensor([TOKENS.encode(NEXT)]), state)[0][0]


def test_it_goes_on_as_after_the_text(model, tmp_path):
    known = from_text(model, TOKENS, TEXT)
    assert known.tokens == len(TEXT)
    out, whole = state_lab.write(tmp_path / "s.pth", unmount(known.state), None, None, [of_text(TEXT)])
    want = after(model, TEXT + NEXT)
    torch.testing.assert_close(after_file(model, whole), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(known.logits[0], model(torch.tensor([[0, *TOKENS.encode(TEXT)]]))[0][0, -1])
    bare = after_file(model, out)
    errors = (bare - want).abs().amax(1)
    assert errors[0] > 1e-2, "the token shift of the last token is missing, and is felt"
    blind = model(torch.tensor([TOKENS.encode(NEXT)]))[0][0]
    assert (bare - want).square().mean() < (blind - want).square().mean(), "it knows something of the text"
    assert not torch.allclose(blind, want, atol=1e-2)


def test_what_the_shifts_absence_costs_is_told(model):
    known = from_text(model, TOKENS, TEXT)
    loss = without_shift(model, known, 12)
    assert loss.first > 0
    assert loss.mean > 0
    assert 0 <= loss.same <= 1
    token = known.logits.argmax(-1, keepdim=True)
    bare = mount(model.initial_state(1), tuned_state.for_clients(unmount(known.state)))
    p, q = (torch.log_softmax(model(token, state)[0][0, -1].double(), -1) for state in (known.state, bare))
    assert loss.first == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6)


def test_a_state_without_shift_costs_nothing_where_none_is_missing(model):
    known = from_text(model, TOKENS, TEXT)
    zeroed = [block._replace(att_shift=block.att_shift * 0, ffn_shift=block.ffn_shift * 0) for block in known.state]
    assert without_shift(model, known._replace(state=zeroed), 5)[:3] == (0, 0, 1)


def test_it_may_be_read_after_another_state(model):
    first = from_text(model, TOKENS, TEXT)
    both = from_text(model, TOKENS, NEXT, first.state)
    at_once = from_text(model, TOKENS, TEXT + NEXT)
    torch.testing.assert_close(both.state, at_once.state, rtol=1e-4, atol=1e-4)


def test_a_long_text_is_read_in_slices(model):
    known = from_text(model, TOKENS, "x" * 1200)
    torch.testing.assert_close(
        known.state, model(torch.tensor([[0, *TOKENS.encode("x" * 1200)]]))[1], rtol=1e-3, atol=1e-3
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3))
def test_taking_a_state_out_and_in_leaves_it(seed):
    model = make(vocab_size=256).eval().requires_grad_(False)
    state = from_text(model, TOKENS, "x" * seed).state
    torch.testing.assert_close(mount(model.initial_state(1), unmount(state)), state, rtol=0, atol=0)


def test_rwkv_4_is_refused():
    model = make(version="4", vocab_size=256).eval()
    with pytest.raises(InputError, match="a state of an RWKV-4: has three numbers a channel and no matrix"):
        from_text(model, TOKENS, TEXT)


def test_an_empty_text_is_refused(model):
    with pytest.raises(InputError, match="the text is empty"):
        from_text(model, TOKENS, "")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("User: Hi\n\nAssistant: Ho\n", "User: Hi\n\nAssistant: Ho\n\n"),
        ("\nSystem: Be brief.", "System: Be brief.\n\n"),
        ("A tale. It says: no.\n", "A tale. It says: no.\n"),
        ("User said", "User said"),
    ],
)
def test_a_conversation_is_read_up_to_where_the_next_turn_begins(given, read):
    assert as_read(given) == read


@pytest.mark.parametrize("kind", ["wkv", "wkv and token shift"])
@pytest.mark.parametrize("recorded", [True, False])
def test_it_is_where_state_tuning_begins(kind, recorded, tmp_path):
    """Run the prompt, save the state, tune from there: before the first step it is the text, and then it learns."""
    base = tmp_path / "base.pth"
    checkpoint.write(base, make(vocab_size=256).state_dict())
    known = from_text(models.load(base).eval(), TOKENS, TEXT)
    out, whole = state_lab.write(tmp_path / "s.pth", unmount(known.state), sha256(base), TOKENS.digest, ())
    file = out if kind == "wkv" else whole
    if not recorded:  # as another program's
        checkpoint.write(file, checkpoint.read(file))
    config = StateConfig(kind="state", state=kind, layers="all", also=(), load=file)
    model = models.load(base)
    attach(model, config, 0, start=warm_start.read(config, base, sha256(base), "none"))
    torch.testing.assert_close(
        model(torch.tensor([TOKENS.encode(NEXT)]))[0][0], after_file(models.load(base), file), rtol=1e-5, atol=1e-5
    )
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(before) == (3 if kind == "wkv" else 9)
    train(model, torch.tensor([TOKENS.encode(NEXT)]), 3)
    assert all(not torch.equal(dict(model.named_parameters())[name], x) for name, x in before.items())


def test_tuning_from_a_state_of_another_model_is_refused(tmp_path):
    base = tmp_path / "base.pth"
    checkpoint.write(base, make(vocab_size=256).state_dict())
    other = {f"blocks.{i}.att.time_state": torch.zeros(2, 16, 16) for i in range(3)}
    checkpoint.write(tmp_path / "s.pth", other)
    config = StateConfig(kind="state", state="wkv", layers="all", also=(), load=tmp_path / "s.pth")
    start = warm_start.read(config, base, sha256(base), "none")
    with pytest.raises(InputError, match=r"time_state is \(2, 16, 16\): it must be \(4, 8, 8\)"):
        attach(models.load(base), config, 0, start=start)
    state_lab.write(tmp_path / "t.pth", other, "f" * 64, None, ())
    with pytest.raises(InputError, match="was trained on another base"):
        warm_start.read(config.model_copy(update={"load": tmp_path / "t.pth"}), base, sha256(base), "none")


def test_a_state_that_no_training_made_goes_with_any_packing(tmp_path):
    base = tmp_path / "base.pth"
    checkpoint.write(base, make(vocab_size=256).state_dict())
    known = from_text(models.load(base).eval(), TOKENS, TEXT)
    state_lab.write(tmp_path / "s.pth", unmount(known.state), sha256(base), None, [of_text(TEXT)])
    config = StateConfig(kind="state", state="wkv", layers="all", also=(), load=tmp_path / "s.pth")
    assert len(warm_start.read(config, base, sha256(base), "nf4") or ()) == 3
