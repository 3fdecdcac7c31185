import pytest
import torch
from methods import EXAMPLES, OTHERS
from random_models import make

from rwkv_core import checkpoint
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import sha256
from rwkv_core.generation.chat import Chat, one_turn, open_chat
from rwkv_core.generation.sampling import Sampling
from rwkv_core.merge import Part, merge
from rwkv_core.models.state import BlockState
from rwkv_core.tokenizer import Tokenizer, bytes_tokenizer

[SHIFTED] = [x for x in OTHERS if x.kind == "lora" and x.state == "wkv and token shift"]
GREEDY = Sampling(max_tokens=60, temperature=0.0, top_p=1.0, seed=0)
DRAWN = Sampling(max_tokens=20, temperature=1.0, top_p=1.0, seed=0)


class Actor(torch.nn.Module):
    """A model of bytes that says its lines, the first after the first "Assistant:" and so on. Its state is all it has read."""

    def __init__(self, *lines):
        super().__init__()
        self.emb, self.head, self.lines = torch.nn.Embedding(256, 1), torch.nn.Identity(), lines
        self.longest = 0

    def features(self, tokens, state=None):
        read = tokens if state is None else torch.cat((state[0].wkv, tokens), 1)
        self.longest = max(self.longest, tokens.shape[1])
        *before, said = bytes(read[0].tolist()).split(b"Assistant:")
        line = self.lines[len(before) - 1].encode() if before else b""
        logits = torch.zeros(1, tokens.shape[1], 256)
        logits[0, -1, line[len(said)] if len(said) < len(line) else 0] = 1.0
        return logits, [BlockState(read, read, read)]


def opened(*lines, **options):
    return Chat(Actor(*lines), bytes_tokenizer(), GREEDY, **options)


def says(chat, message, **options):
    return "".join(chat.answer(message, **options))


def heard(chat):
    """All that the model has read so far."""
    return bytes(chat.last.state[0].wkv[0].tolist()).decode()


def test_turns_are_in_worlds_convention():
    chat = opened(" Hello.\n\nUser: not me", " Good.")
    assert says(chat, "Hi!") == "Hello."
    assert heard(chat) == "\0User: Hi!\n\nAssistant: Hello.\n\nUser"
    assert says(chat, " How are\r\n \r\n\r\nyou? \n") == "Good."
    assert heard(chat) == "\0User: Hi!\n\nAssistant: Hello.\n\nUser: How are\nyou?\n\nAssistant: Good."
    assert chat.transcript == heard(chat)[1:]


def test_the_system_text_is_said_first():
    chat = opened(" Yes.", system="Be\n\nbrief. ")
    says(chat, "Ready?")
    assert heard(chat) == "\0System: Be\nbrief.\n\nUser: Ready?\n\nAssistant: Yes."
    assert chat.transcript == heard(chat)[1:]


@pytest.mark.parametrize(
    ("line", "between"),
    [
        (" One.", "\n\nUser"),
        (" One.\n", "\n\nUser"),
        (" One.\n\n\n", "\n\n\nUser"),
        (" One.\n\nUser: x", "\n\nUser"),
        (" One.\n\nUse", "\n\nUse\n\nUser"),
    ],
)
def test_a_blank_line_that_the_model_has_said_is_not_said_again(line, between):
    chat = opened(line, " Two.")
    says(chat, "1")
    says(chat, "2")
    assert heard(chat) == f"\0User: 1\n\nAssistant: One.{between}: 2\n\nAssistant: Two."


def test_pieces_come_as_they_are_said():
    assert list(opened(" ab é\n\nUser:").answer("x")) == ["a", "b", " ", "é"]


def test_an_answer_has_a_largest_length():
    chat = opened(" " + "x" * 100, " y")
    assert says(chat, "1") == "x" * 59
    assert chat.last.ending == "length"
    says(chat, "2")
    assert heard(chat).endswith("x\n\nUser: 2\n\nAssistant: y")


def test_an_interrupted_answer_stays_in_the_conversation():
    chat = opened(" One, two, three.", " Four.")
    count = iter(range(100))
    assert says(chat, "count", halt=lambda: next(count) == 9) == "One, two"
    assert chat.last.ending == "halted"
    assert says(chat, "on") == "Four."
    assert heard(chat) == "\0User: count\n\nAssistant: One, two\n\nUser: on\n\nAssistant: Four."


def test_a_turn_whose_answer_nobody_waited_for_was_not_said():
    chat = opened(" One.", " Two.")
    says(chat, "1")
    before = heard(chat)
    unfinished = chat.answer("2")
    assert next(unfinished) == "T"
    unfinished.close()
    assert heard(chat) == before
    assert chat.transcript == "User: 1\n\nAssistant: One."


def test_reset_forgets():
    chat = opened(" One.", " Two.")
    says(chat, "1")
    chat.reset()
    assert chat.transcript == ""
    assert says(chat, "1") == "One."


def test_retry_takes_the_place_of_the_last_answer():
    chat = opened(" One.", " Two.")
    says(chat, "1")
    says(chat, "2")
    assert "".join(chat.retry()) == "Two."
    assert heard(chat) == "\0User: 1\n\nAssistant: One.\n\nUser: 2\n\nAssistant: Two."
    assert chat.transcript == heard(chat)[1:]


def test_retry_draws_anew():
    def answers(seed):
        chat = Chat(make(vocab_size=256).eval(), bytes_tokenizer(), Sampling(20, 1.0, 1.0, seed))
        return ["".join(chat.answer("?")), "".join(chat.retry()), "".join(chat.retry()), "".join(chat.answer("!"))]

    assert answers(0) == answers(0)
    assert len(set(answers(0))) == 4
    assert answers(0)[1] == answers(1)[0]


def test_a_long_message_is_read_in_slices():
    chat = opened(" Long.")
    says(chat, "x" * 2000)
    assert chat._model.longest == 512


def test_going_on_is_reading_all_again():
    ascii_only = Tokenizer([b"", *(bytes([i]) for i in range(1, 128))], lambda text: list(text.encode("ascii")))
    model = make(vocab_size=128).eval()
    chat, text = Chat(model, ascii_only, DRAWN), "\0"
    for message in ("one", "two", "three"):
        list(chat.answer(message))
        text += chat._asked[1] + chat.last.read
    assert text.count("\n\nUser: ") == 2
    with torch.no_grad():
        _, state = model(torch.tensor([list(text.encode())]))
    torch.testing.assert_close(chat.last.state, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", ["", " \n\n "])
def test_an_empty_message_is_refused(empty):
    with pytest.raises(InputError, match=r"the message is empty: .*; say something"):
        opened().answer(empty)


def test_there_is_nothing_to_retry_at_first():
    with pytest.raises(InputError, match="there is no answer yet"):
        opened().retry()


@pytest.mark.parametrize(
    ("text", "turn"),
    [("a\n\nb", "a\nb"), (" a \r\n\r\n b\n", "a \n b"), ("a\n \t\n\n\nb", "a\nb"), ("a\nb", "a\nb"), ("\n", "")],
)
def test_a_turn_has_no_blank_lines(text, turn):
    assert one_turn(text) == turn


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.pth"
    checkpoint.write(path, make(vocab_size=256).state_dict())
    return path


@pytest.fixture
def adapter(base, tmp_path):
    model = make(vocab_size=256)
    config = EXAMPLES[0].model_copy(update={"dropout": 0.5})
    attach(model, config, 1)
    tensors = {name: torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) * 0.2
               for i, (name, x) in enumerate(trained_state(model).items())}  # fmt: skip
    record = AdapterRecord(
        format=1, adapter=config, base_sha256=sha256(base), data_sha256="d", vocabulary_sha256="v", run="r"
    )
    file.write(tmp_path / "adapter.pth", tensors, record)
    return tmp_path / "adapter.pth"


def test_an_adapter_beside_the_base_says_what_the_merged_model_says(base, adapter, tmp_path):
    merge(base, [Part(adapter)], tmp_path / "merged.pth")
    beside, merged = open_chat(base, DRAWN, adapter=adapter), open_chat(tmp_path / "merged.pth", DRAWN)
    assert says(beside, "Well?") == says(merged, "Well?") != says(open_chat(base, DRAWN), "Well?")
    torch.testing.assert_close(beside.last.state, merged.last.state, rtol=1e-4, atol=1e-4)


def test_special_tokens_are_said(tmp_path):
    """By a model that says one of them always; without its text it is a free id, and those end an answer."""
    model = make(vocab_size=65536)
    with torch.no_grad():
        model.ln_out.weight.zero_()
        model.ln_out.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[65530] = 1.0
    checkpoint.write(tmp_path / "world.pth", model.state_dict())
    few = Sampling(max_tokens=3, temperature=0.0, top_p=1.0, seed=0)
    assert says(open_chat(tmp_path / "world.pth", few, special={"<tool>": 65530}), "<tool>") == "<tool>" * 3
    assert says(open_chat(tmp_path / "world.pth", few), "<tool>") == ""


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path):
    other = tmp_path / "other.pth"
    checkpoint.write(other, make(vocab_size=256, seed=1).state_dict())
    with pytest.raises(InputError, match="was trained on another base"):
        open_chat(other, DRAWN, adapter=adapter)


def test_an_adapter_that_does_not_fit_is_refused(base, adapter):
    tensors, record = file.read(adapter)
    for wrong in (
        {name: x for name, x in tensors.items() if "lora_B" not in name},
        tensors | {"blocks.0.att.key.lora_A": torch.zeros(3, 32)},
        {name: torch.zeros(x.shape[0] + 1, x.shape[1]) for name, x in tensors.items()},
    ):
        file.write(adapter, wrong, record)
        with pytest.raises(InputError, match=r"does not fit the base: .*; train the adapter anew"):
            open_chat(base, DRAWN, adapter=adapter)


@pytest.fixture
def with_state(base, tmp_path):
    """A LoRA with a tuned state, and its shift; every number of it random."""
    model = make(vocab_size=256)
    attach(model, SHIFTED, seed=0)
    generator = torch.Generator().manual_seed(2)
    tensors = {name: 0.1 * torch.randn(x.shape, generator=generator) for name, x in trained_state(model).items()}
    record = AdapterRecord(
        format=1, adapter=SHIFTED, base_sha256=sha256(base), data_sha256="d", vocabulary_sha256="v", run="r"
    )
    file.write(tmp_path / "adapter.pth", tensors, record)
    return tmp_path / "adapter.pth"


def test_an_adapter_with_a_state_says_what_the_merged_model_says_from_it(base, with_state, tmp_path):
    merge(base, [Part(with_state)], tmp_path / "merged.pth")
    beside = open_chat(base, DRAWN, adapter=with_state)
    merged, clients = (
        open_chat(tmp_path / "merged.pth", DRAWN, state=tmp_path / f"merged.state.{name}")
        for name in ("rwkv-flow.pth", "pth")
    )
    assert says(beside, "hello") == says(merged, "hello")
    torch.testing.assert_close(beside.last.state, merged.last.state, rtol=1e-4, atol=1e-4)
    assert all(not block.att_shift.any() for block in clients._start)
    torch.testing.assert_close([block.wkv for block in clients._start], [block.wkv for block in beside._start])
    assert all(block.att_shift.any() and block.ffn_shift.any() and block.wkv.any() for block in beside._start)


def test_two_states_are_refused(base, with_state, tmp_path):
    merge(base, [Part(with_state)], tmp_path / "merged.pth")
    with pytest.raises(InputError, match=r"state\.pth: .*adapter\.pth has a state of its own; give one of them"):
        open_chat(base, DRAWN, adapter=with_state, state=tmp_path / "merged.state.pth")


def test_a_tuned_state_is_where_it_begins(base, tmp_path):
    states = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    checkpoint.write(tmp_path / "state.pth", {f"blocks.{i}.att.time_state": x for i, x in enumerate(states)})
    chat = open_chat(base, DRAWN, state=tmp_path / "state.pth")
    assert all(torch.equal(block.wkv[0], x) for block, x in zip(chat._start, states, strict=True))
    first = says(chat, "Well?")
    assert first != says(open_chat(base, DRAWN), "Well?")
    chat.reset()
    chat._answers = 0
    assert says(chat, "Well?") == first


def test_what_to_compute_in(base):
    chat = open_chat(base, DRAWN, dtype="bf16", device="cpu")
    says(chat, "Well?")
    assert chat.last.state[0].att_shift.dtype == torch.bfloat16


def test_a_device_that_is_not_there_is_refused(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WorldError, match="device cuda: torch finds no CUDA device here; take cpu"):
        open_chat(base, DRAWN, device="cuda")


def test_a_vocabulary_that_no_tokenizer_is_known_for_is_refused(tmp_path):
    checkpoint.write(tmp_path / "odd.pth", make(vocab_size=64).state_dict())
    with pytest.raises(InputError, match="a vocabulary of 64: known are"):
        open_chat(tmp_path / "odd.pth", DRAWN)
