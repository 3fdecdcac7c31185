import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import VERSIONS, make

from rwkv_core.errors import InputError
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Continuation, Output, generate, read, read_together, stream
from rwkv_core.models.state import BlockState, concatenate, mount, select
from rwkv_core.tokenizer import Tokenizer

LETTERS = Tokenizer([b"", *(bytes([31 + i]) for i in range(1, 62)), b"", b""], lambda text: [ord(c) - 31 for c in text])
"""Ids 1 to 61 are characters from the blank on; 62 and 63 are free."""

GREEDY = Sampling(max_tokens=10, temperature=0.0, top_p=1.0, seed=0)
DRAWN = replace(GREEDY, temperature=1.0, top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2, penalty_decay=0.9)
SIZES = {"ctx_len": 16, "batch": 8}


class Script(torch.nn.Module):
    """A model that says the given tokens in every row, whatever it reads, and notes what it was asked.

    Its state is how many tokens it has read.
    """

    def __init__(self, *tokens):
        super().__init__()
        self.emb = torch.nn.Embedding(64, 1)
        self.head = torch.nn.Identity()
        self.tokens, self.asked = tokens, []

    def features(self, tokens, state=None):
        self.asked.append(tokens.tolist())
        before = torch.full((len(tokens), 1), -1.0) if state is None else state[0].wkv
        after = before + 1  # the first call reads the prompt
        logits = torch.full((*tokens.shape, 64), -30.0)
        for row, n in enumerate(after[:, 0].long().tolist()):
            logits[row, -1, self.tokens[n]] = 0.0
        return logits, [BlockState(after, after, after)]


def said(tokens, tokenizer=LETTERS, prompt="", **options):
    return generate(Script(*tokens), tokenizer, [prompt], replace(GREEDY, **options), **SIZES)[0]


def ids(text):
    return LETTERS.encode(text)


def test_the_prompt_follows_token_0_and_each_token_is_read_once():
    model = Script(*ids("GH"), 0)
    whole = generate(model, LETTERS, ["!#"], GREEDY, **SIZES)[0]
    assert (whole.text, whole.ending, whole.read) == ("GH", "end", "GH")
    assert model.asked == [[[0, 2, 4]], [[40]], [[41]]]


def test_a_long_prompt_is_read_in_slices():
    model = Script(*ids("......"), 0)
    generate(model, LETTERS, ["ABCDEFGHIJ"], GREEDY, ctx_len=4, batch=1)
    assert [len(tokens[0]) for tokens in model.asked[:4]] == [4, 4, 3, 1]


@pytest.mark.parametrize("end", [0, 62])
def test_ends_at_the_end_of_the_document_and_at_free_ids(end):
    whole = said([40, end, 40])
    assert (whole.text, whole.ending) == ("G", "end")


def test_ends_at_ids_that_the_tokenizer_does_not_have():
    short = Tokenizer(LETTERS.table[:50], LETTERS.encode)
    assert said([40, 60], short).ending == "end"


def test_ends_after_max_tokens_and_has_read_them_all():
    whole = said([40] * 50, max_tokens=4)
    assert (whole.text, whole.ending, whole.read) == ("GGGG", "length", "GGGG")
    assert float(whole.state[0].wkv) == 4  # the prompt, and four tokens


def test_a_stop_text_is_no_part_of_the_text():
    whole = said(ids("HI YOU: X"), stop=("YOU:",))
    assert (whole.text, whole.ending, whole.read) == ("HI ", "stop", "HI YOU")


def test_the_beginning_of_a_stop_text_is_text_if_nothing_follows():
    assert said([*ids("HI YOU"), 0], stop=("YOU:",)).text == "HI YOU"
    assert said(ids("HI YOU:"), stop=("YOU:",), max_tokens=5).text == "HI YO"


def test_what_is_left_to_read_after_a_stop_text():
    whole = said(ids("HI YOU:"), stop=("YOU:",))
    assert whole.unread("HI YOU: GO ON") == ": GO ON"
    assert whole.unread("HI THERE") == "THERE"
    assert Continuation("HI", "end", [], "HI").unread("HI. GO") == ". GO"


PIECES = Tokenizer([b"", b"\xf0\x9f", b"\xa6\x85", b"a\n", b"\nUser", b":**", b"\xff", *[b""] * 57], lambda text: [])


def test_ends_inside_a_character():
    assert said([1, 2], PIECES, max_tokens=1).text == "\ufffd"
    assert said([1, 2, 1], PIECES, max_tokens=2).text == "🦅"
    pieces = stream(Script(1, 2, 6, 1, 0), PIECES, [""], GREEDY, **SIZES)
    assert [piece.text for piece in pieces] == ["🦅", "\ufffd", "\ufffd"]


def test_a_token_may_begin_before_a_stop_text_and_end_after_it():
    whole = said([3, 4, 5, 1], PIECES, stop=("\n\nUser:",))
    assert (whole.text, whole.ending, whole.read) == ("a", "stop", "a\n\nUser")
    assert whole.unread("a\n\nUser: b") == ": b"


def test_a_stop_text_in_one_token_with_what_is_before_it():
    whole = said([4, 3], PIECES, stop=("\n",))
    assert (whole.text, whole.read) == ("", "")
    whole = said([5, 3], PIECES, stop=("\n",))
    assert (whole.text, whole.read) == (":**a", ":**")
    assert whole.unread(":**a\nb") == "a\nb"


def cut(data, at):
    borders = [0, *sorted(at), len(data)]
    return [data[i:j] for i, j in itertools.pairwise(borders)]


def released(data, at, stop=()):
    """The text that comes out, and what was out after each part."""
    output, text, steps = Output(stop), "", []
    for part in cut(data, [i % (len(data) + 1) for i in at]):
        text += output.push(part)
        steps.append(text)
    if not output.stopped:
        text += output.finish()
    return text, steps, output.stopped


CUTS = st.lists(st.integers(0, 200), max_size=8)


@settings(deadline=None, max_examples=300)
@given(data=st.one_of(st.binary(max_size=20), st.text(max_size=20).map(str.encode)), at=CUTS)
def test_the_bytes_of_a_text_may_be_cut_anywhere(data, at):
    text, steps, _ = released(data, at)
    whole = data.decode(errors="replace")
    assert text == whole
    assert all(whole.startswith(step) for step in steps)


def by_definition(text, stop):
    """The text before the first stop text to be complete; of several that are so together, the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(deadline=None, max_examples=500)
@given(text=st.text("abé", max_size=14), stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), at=CUTS)
def test_stop_texts_are_found_wherever_the_tokens_end(text, stop, at):
    wanted, stopped = by_definition(text, stop)
    out, steps, found = released(text.encode(), at, stop)
    assert (out, found) == (wanted, stopped)
    assert all(wanted.startswith(step) for step in steps)


@pytest.mark.parametrize("border", range(1, 20))
def test_a_stop_text_may_be_cut_at_every_border(border):
    assert released("Yes。\n\nUser: go".encode(), [border], ["\n\nUser:"])[::2] == ("Yes。", True)


@settings(deadline=None, max_examples=200)
@given(text=st.text("abc", max_size=14), stop=st.text("abc", min_size=1, max_size=4))
def test_nothing_is_held_back_without_need(text, stop):
    output = Output([stop])
    out = "".join(output.push(c.encode()) for c in text)
    if not output.stopped:
        assert stop.startswith(text[len(out) :])


# real models


@pytest.fixture(scope="module", params=VERSIONS)
def model(request):
    return make(version=request.param).eval()


PROMPTS = ["AB", "HELLO, WORLD", "", "A LONG ONE " * 5, "X"]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_row_is_the_same_alone_and_in_any_company(model, sampling):
    """Rows may stand elsewhere among others, and be side by side with more or fewer: their numbers decide."""
    together = generate(model, LETTERS, PROMPTS, sampling, ctx_len=7, batch=5)
    for batch in (1, 2, 3):
        others = generate(model, LETTERS, PROMPTS, sampling, ctx_len=7, batch=batch)
        assert [x.text for x in others] == [x.text for x in together]
        for one, other in zip(others, together, strict=True):
            assert (one.ending, one.read) == (other.ending, other.read)
            torch.testing.assert_close(one.state, other.state, rtol=1e-4, atol=1e-4)
    company = ["OTHER", "WORDS", *PROMPTS[2:]]
    assert [x.text for x in generate(model, LETTERS, company, sampling, ctx_len=7, batch=5)][2:] == [
        x.text for x in together[2:]
    ]


def test_equal_prompts_are_continued_differently():
    texts = [x.text for x in generate(make().eval(), LETTERS, ["AB"] * 4, DRAWN, **SIZES)]
    assert len(set(texts)) == 4


def test_greedy_is_the_likeliest_token_of_the_whole_sequence(model):
    whole = generate(model, LETTERS, ["AB"], GREEDY, **SIZES)[0]
    tokens = [0, *ids("AB")]
    with torch.no_grad():
        for character in whole.text:
            best = int(model(torch.tensor([tokens]))[0][0, -1].argmax())
            assert LETTERS.decode([best]) == character
            tokens.append(best)
        best = int(model(torch.tensor([tokens]))[0][0, -1].argmax())
    assert whole.ending == "length" if len(whole.text) == 10 else best in (0, 62, 63)


@pytest.mark.parametrize("stop", [(), ("B",)])
def test_going_on_from_a_state_is_reading_all_again(model, stop):
    """The state is after the prompt and `read`, however the text ended."""
    prompts = ["TELL ME MORE", "ONCE", "!", "ABC"]
    for prompt, whole in zip(
        prompts, generate(model, LETTERS, prompts, replace(DRAWN, stop=stop), **SIZES), strict=True
    ):
        onward = ". AND THEN"
        again, state = read(model, [0, *ids(prompt + whole.read + onward)], None, 100)
        logits, after = read(model, ids(onward), whole.state, 3)
        torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, state, rtol=1e-4, atol=1e-4)
        (one,) = generate(model, LETTERS, [onward], GREEDY, states=[whole.state], **SIZES)
        (all_again,) = generate(model, LETTERS, [prompt + whole.read + onward], GREEDY, **SIZES)
        assert one.text == all_again.text


def test_a_tuned_state_is_gone_on_from_without_token_0():
    model = make().eval()
    tuned = mount(model.initial_state(1), {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8) for i in range(3)})
    logits, _ = read(model, ids("AB"), tuned, 8)
    (whole,) = generate(model, LETTERS, ["AB"], replace(GREEDY, max_tokens=1), states=[tuned], **SIZES)
    assert whole.read == LETTERS.decode([int(logits.argmax())])


def test_each_prompt_may_have_a_state_or_none():
    model = make().eval()
    first, second = generate(model, LETTERS, ["AB", "CD"], GREEDY, **SIZES)
    mixed = generate(model, LETTERS, ["AB", "E"], GREEDY, states=[None, second.state], **SIZES)
    assert mixed[0].text == first.text
    with pytest.raises(InputError, match="prompt 1 is empty: a text that goes on must go on with something; add some"):
        generate(model, LETTERS, ["AB", ""], GREEDY, states=[None, second.state], **SIZES)


def test_the_pieces_make_up_the_texts():
    model = make().eval()
    sampling = replace(DRAWN, stop=("E", "AB"), max_tokens=30)
    texts = [""] * len(PROMPTS)
    endings = {}
    for piece in stream(model, LETTERS, PROMPTS, sampling, ctx_len=16, batch=2):
        assert piece.row not in endings
        texts[piece.row] += piece.text
        if piece.whole is not None:
            endings[piece.row] = piece.whole
    wholes = generate(model, LETTERS, PROMPTS, sampling, **SIZES)
    assert texts == [x.text for x in wholes] == [endings[i].text for i in range(len(PROMPTS))]


def test_global_random_numbers_have_no_part_in_it():
    model = make().eval()
    torch.manual_seed(1)
    one = generate(model, LETTERS, PROMPTS, DRAWN, **SIZES)
    torch.manual_seed(2)
    two = generate(model, LETTERS, PROMPTS, DRAWN, **SIZES)
    other = generate(model, LETTERS, PROMPTS, replace(DRAWN, seed=1), **SIZES)
    assert [x.text for x in one] == [x.text for x in two] != [x.text for x in other]


def test_halting_ends_all_as_they_are():
    model, asked = make().eval(), []

    def halt():
        asked.append(None)
        return len(asked) > 3

    wholes = [
        p.whole for p in stream(model, LETTERS, ["A", "B", "C"], GREEDY, ctx_len=8, batch=2, halt=halt) if p.whole
    ]
    assert [(x.ending, len(x.text)) for x in wholes] == [("halted", 3)] * 2
    logits, _ = read(model, ids("!"), wholes[0].state, 8)
    again, _ = read(model, [0, *ids("A" + wholes[0].text + "!")], None, 8)
    torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)


def test_no_prompts_no_texts():
    assert generate(make().eval(), LETTERS, [], GREEDY, **SIZES) == []


def test_the_logits_of_a_prompt_are_never_built():
    model = make().eval()
    widths = []
    model.head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape))
    generate(model, LETTERS, ["A LONG PROMPT", "ANOTHER"], GREEDY, ctx_len=4, batch=2)
    assert all(len(shape) == 2 and shape[0] <= 2 for shape in widths)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ctx_len", [1, 4, 100])
def test_texts_read_together_are_read_as_each_by_itself(version, ctx_len):
    """Whatever their lengths and their order, from a state of their own each, and up to the state where each ends."""
    model = make(version=version).eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 64, (n,), generator=generator).tolist() for n in (5, 1, 9, 5, 13, 2)]
    begun = [read(model, text, None, 100)[1] for text in texts[::-1]]
    for states in (None, begun):
        logits, after = read_together(model, texts, None if states is None else concatenate(states), ctx_len)
        for row, text in enumerate(texts):
            wanted, state = read(model, text, None if states is None else states[row], 100)
            torch.testing.assert_close(logits[row : row + 1], wanted, rtol=1e-4, atol=1e-4)
            for block, one in zip(select(after, [row]), state, strict=True):
                torch.testing.assert_close(block, one, rtol=1e-4, atol=1e-4)


def test_texts_of_one_length_are_read_at_once():
    model = Script(*ids("GHI"), 0)
    read_together(model, [ids("ABC"), ids("DEF"), ids("DEF")], None, 100)
    assert [len(tokens) for tokens in model.asked] == [3]
