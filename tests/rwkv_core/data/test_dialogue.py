import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import part

from rwkv_core.data.dialogue import ROLES, Text, one_turn, read, spans, turns
from rwkv_core.data.source import Unusable
from rwkv_core.generation.chat import one_turn as one_turn_of_chat

CHAT = "User: Hi\n\nAssistant: Hello."


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def said(*contents, **more):
    """Messages, the user's first."""
    return {"messages": [message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)], **more}


def text_of(fields, **settings):
    return read(fields, part(**settings)).text


def learned_of(fields, **settings):
    """The stretches that are learned, as texts."""
    text, learned, _ = read(fields, part(**settings))
    return None if learned is None else [text[a:b] for a, b in learned]


FORMS = {
    "text": ({"text": CHAT}, CHAT),
    "messages": (said("Hi", "Hello."), CHAT),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, CHAT),
    "conversations of messages": ({"conversations": said("Hi", "Hello.")["messages"]}, CHAT),
    "prompt": ({"prompt": "Hi", "completion": "Hello."}, CHAT),
    "prompt of messages": (
        {"prompt": said("Hi")["messages"], "completion": [message("assistant", "Hello.")]},
        CHAT,
    ),
    "question": ({"question": "Hi", "answer": "Hello."}, CHAT),
    "instruction": ({"instruction": "Add.", "input": "1, 2", "output": "3"},
        "Instruction: Add.\n\nInput: 1, 2\n\nResponse: 3"),
    "instruction, no input": ({"instruction": "Hi", "input": "", "output": "Yo"}, "Instruction: Hi\n\nResponse: Yo"),
    "instruction, null": ({"instruction": "Hi", "input": None, "output": "Yo"}, "Instruction: Hi\n\nResponse: Yo"),
    "system field": ({"question": "Hi", "answer": "Hello.", "system": "Be\n\nkind."}, f"System: Be\nkind.\n\n{CHAT}"),
    "system message": ({"messages": [message("system", "Be kind."), *said("Hi", "Hello.")["messages"]]},
        f"System: Be kind.\n\n{CHAT}"),
    "developer message": ({"messages": [message("developer", "Be kind."), *said("Hi", "Hello.")["messages"]]},
        f"System: Be kind.\n\n{CHAT}"),
    "pieces": (said([{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}], "Yo"), "User: Hi\nyou\n\nAssistant: Yo"),
    "cleaned": (said(" a\r\n\r\nb \n", "\n c\n \t\n\n d"), "User: a\nb\n\nAssistant: c\n d"),
    "turns": (said("1", "2", "3", "4"), "User: 1\n\nAssistant: 2\n\nUser: 3\n\nAssistant: 4"),
    "other fields": ({**said("Hi", "Hello."), "id": 7, "source": "x"}, CHAT),
    "most structured first": ({**said("Hi", "Hello."), "text": "t", "prompt": "p", "completion": "c"}, CHAT),
    "nulls are not there": ({"messages": None, "prompt": None, "completion": None, "text": CHAT}, CHAT),
    "half a form is none": ({"text": CHAT, "prompt": "p", "instruction": "i"}, CHAT),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_a_text(form):
    fields, text = FORMS[form]
    before = json.dumps(fields)
    assert read(fields, part()) == Text(text, None, 1)
    assert json.dumps(fields) == before
    assert learned_of(fields, mask="qa")[-1] == text[text.rindex(": ") + 1 :]


def test_tools_are_as_g1_models_know_them():
    weather = {"name": "weather", "arguments": '{"city": "Köln"}'}
    fields = {
        "tools": [{"name": "weather"}],
        "messages": [
            message("system", "Help."),
            message("user", "Rain?"),
            message("assistant", None, tool_calls=[{"type": "function", "function": weather}]),
            message("tool", " 3 mm \n"),
            message("assistant", "Two more.", tool_calls=[{"function": weather}, {"function": {"name": "f"}}]),
            message("function", "ok"),
            message("assistant", "Yes."),
        ],
    }
    text = (
        'System: Help.\nTools:\n[{"name": "weather"}]\n\nUser: Rain?\n\n'
        'Assistant: ```json\n{"name": "weather", "arguments": {"city": "Köln"}}\n```\n\nUser: Function output: 3 mm\n\n'
        'Assistant: Two more.\n```json\n[{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "f", "arguments": {}}]'
        "\n```\n\nUser: Function output: ok\n\nAssistant: Yes."
    )
    assert text_of(fields) == text
    assert text_of({**fields, "messages": fields["messages"][1:], "tools": '["a"]'}).startswith(
        'System: Tools:\n["a"]\n\n'
    )
    assert (
        text_of({**said("a", "b"), "tools": "[]"})
        == text_of({**said("a", "b"), "tools": []})
        == "User: a\n\nAssistant: b"
    )
    old = message("assistant", None, function_call=weather)
    assert text_of({"messages": [message("user", "Rain?"), old]}) in text
    turns = [("human", "Rain?"), ("function_call", '{"a": 1}'), ("observation", "3"), ("gpt", "Yes.")]
    assert text_of({"conversations": [{"from": a, "value": b} for a, b in turns]}) == (
        'User: Rain?\n\nAssistant: ```json\n{"a": 1}\n```\n\nUser: Function output: 3\n\nAssistant: Yes.'
    )


def test_columns_name_the_fields():
    row = {"frage": "Hi", "antwort": "Hello.", "text": "t", "w": "0.5"}
    columns = {"question": "frage", "answer": "antwort", "weight": "w"}
    assert read(row, part(columns=columns)) == Text(CHAT, None, 0.5)
    assert text_of({"body": "t"}, columns={"text": "body"}) == "t"
    both = {"messages": said("a", "b")["messages"], "text": "t"}
    assert text_of(both, columns={"text": "text"}) == "t"
    assert text_of({"instruction": "a", "ctx": "b", "output": "c"}, columns={"input": "ctx"}) == (
        "Instruction: a\n\nInput: b\n\nResponse: c"
    )
    with pytest.raises(
        Unusable, match="fields 'frage', 'text': there is no 'antwort', which columns says is the answer"
    ):
        read({"frage": "Hi", "text": "t"}, part(columns={"question": "frage", "answer": "antwort"}))
    with pytest.raises(ValueError, match="Input should be 'text', 'messages'"):
        part(columns={"antwort": "answer"})


BAD = {
    "no fields": ({},
        "fields none: a row has messages; conversations; instruction and output; .*; text, none of them null, or columns says"),
    "unknown fields": ({"content": "a", "id": 1}, "fields 'content', 'id': a row has"),
    "text": ({"text": 5}, "text is int: must be a text"),
    "null": ({"text": None}, "fields 'text': a row has messages; .*, none of them null"),
    "null beside": ({"question": "a", "answer": None}, "fields 'question', 'answer': a row has"),
    "empty": ({"text": " \n"}, "the text is empty: nothing"),
    "answer": ({"question": "a", "answer": 4}, "answer is int: must be a text"),
    "no list": ({"messages": "hi"}, "messages: must be a list of messages"),
    "no messages": ({"conversations": []}, "conversations: must be a list"),
    "no message": ({"messages": ["hi"]}, r"messages\[0\] is str: must have a role"),
    "role": ({"messages": [message("user", "a"), message("narrator", "b")]},
        r"messages\[1\]: 'narrator' is no role; known are system,"),
    "no role": ({"messages": [{"content": "b"}]}, r"messages\[0\]: None is no role"),
    "no content": ({"messages": [message("user", None)]}, r"messages\[0\].content is null: must be a text"),
    "image": ({"messages": [message("user", [{"type": "image_url"}])]},
        r"messages\[0\].content: has a piece that is image_url; only"),
    "call": ({"messages": [message("assistant", "", tool_calls=[{"function": {}}])]},
        r"messages\[0\]: has a call of a tool without a name"),
    "arguments": ({"messages": [message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]},
        r"messages\[0\]: calls f with arguments that are no JSON"),
    "message weight": ({"messages": [message("user", "a", weight=2)]}, r"messages\[0\].weight = 2: must be 0, "),
    "half a pair": ({"text": "ab\ud83e"}, r"\\ud83e at character 3: half of a surrogate pair is no character"),
    **{f"weight {w}": ({"text": "a", "weight": w}, f"weight = '{w}': must be a number above 0")
       for w in (0, -1, True, float("nan"), float("inf"), "x", {})},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_makes_no_text_says_why(case):
    fields, message = BAD[case]
    with pytest.raises(Unusable, match=message) as caught:
        read(fields, part())
    assert "\n" not in str(caught.value)


def test_weights():
    assert read({"text": "a", "weight": 2.5}, part(weight=2)).weight == 5
    assert read({"text": "a", "weight": None}, part(weight=2)).weight == 2
    assert read({"text": "a", "weight": "2"}, part()).weight == 2


THOUGHTS = {
    "as_given": {"plain": "A", "thought": "<think>t</think>\nA", "field": "<think>f</think>\nA"},
    "empty": {"plain": "<think></think>\nA", "thought": "<think>t</think>\nA", "field": "<think>f</think>\nA"},
    "remove": {"plain": "A", "thought": "A", "field": "A"},
}


@pytest.mark.parametrize("think", THOUGHTS)
def test_thoughts(think):
    wanted = THOUGHTS[think]
    for field in ("reasoning_content", "thinking"):
        rows = {
            "plain": message("assistant", "A"),
            "thought": message("assistant", "<think>t</think>\n\nA" if think == "remove" else "<think>t</think>\nA"),
            "field": message("assistant", "A", **{field: " f\n"}),
        }
        for name, answer in rows.items():
            text = f"User: Q\n\nAssistant: {wanted[name]}"
            assert text_of({"messages": [message("user", "Q"), answer]}, think=think) == text
    given = (
        "User: <think>q</think>\n\nAssistant: A\n\nUser: Q\n\nAssistant: <think>\nt</think>\nA\n\nUser: R\n\nAssistant:"
    )
    answers = ["<think></think>\nA" if think == "empty" else "A", "A" if think == "remove" else "<think>\nt</think>\nA"]
    assert text_of({"text": given}, think=think) == (
        f"User: <think>q</think>\n\nAssistant: {answers[0]}\n\nUser: Q\n\nAssistant: {answers[1]}\n\nUser: R\n\nAssistant:"
    )


def test_blank_lines():
    row = said("a\n\n\nb", "c\n \nd\r\n\r\ne")
    assert text_of(row) == "User: a\nb\n\nAssistant: c\nd\ne"
    assert text_of(row, blank_lines="keep") == "User: a\n\n\nb\n\nAssistant: c\n \nd\n\ne"
    given = "User: a\n\n\nb\n\nAssistant:  c\n\nd \n\n"
    assert text_of({"text": given}) == "User: a\nb\n\nAssistant:  c\nd \n\n"
    assert text_of({"text": given}, blank_lines="keep") == given


@pytest.mark.parametrize(
    "text",
    [
        "A story.\n\nIt goes on.\n\nUser: not\n\na turn\n\nAssistant: really",
        "Input: a number\n\nThe number.\n\n\nMore",
        "A: Where?\n\nB: There.\n\n\nA: Oh.",
        "Windows\r\n\r\nline ends ",
        "System: all of\n\nit",
    ],
)
def test_a_text_that_is_no_conversation_stays_as_it_is(text):
    assert text_of({"text": text}, think="empty") == text


def test_a_blank_line_that_would_begin_a_turn_is_never_kept():
    row = said("Say:\n\n \nUser: x\n\nplain\nAssistant: y", "Q: a\n\nA: b\n\nc")
    kept = text_of(row, blank_lines="keep")
    assert kept == "User: Say:\nUser: x\n\nplain\nAssistant: y\n\nAssistant: Q: a\nA: b\n\nc"
    assert learned_of(row, blank_lines="keep", mask="qa") == [" Q: a\nA: b\n\nc"]


LEARNED = {
    "turns": ("System: s\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d", [" b\n\n", " d"]),
    "other names": ("Human: a\n\nBot: b\n\nUser: c\n\nAI: d", [" b\n\n", " d"]),
    "instruction": ("Instruction: a\n\nInput: b\n\nResponse: c", [" c"]),
    "question": ("Question: a\n\nAnswer: b\n\nQuestion: c\n\nAnswer: d", [" b\n\n", " d"]),
    "q": ("Q: a\n\nA: b\n\nQ: c\n\nA: d", [" b\n\n", " d"]),
    "blank lines": ("User: a\n\nAssistant: b\n\nc\n\n\nUser: d", [" b\n\nc\n\n\n"]),
    "CRLF": ("User: a\r\n\r\nAssistant: b\r\n\r\nUser: c\r\n\r\nAssistant: d", [" b\r\n\r\n", " d"]),
    "no blank": ("User:a\n\nAssistant:** b", ["** b"]),
    "colon in the answer": ("User: a\n\nAssistant: b: c", [" b: c"]),
    "a single line end begins no turn": ("User: a\nAssistant: x\n\nAssistant: b\nUser: y", [" b\nUser: y"]),
    "roles of another kind": ("User: a\n\nAssistant: b\n\nInput: c\n\nAnswer: d\n\nUser: e",
        [" b\n\nInput: c\n\nAnswer: d\n\n"]),
    "behind an article": ("It rains.\n\nQuestion: Does it?\n\nAnswer: Yes.", [" Yes."]),
    "no answer at the end": ("User: a\n\nAssistant: b\n\nUser: c", [" b\n\n"]),
    "empty answers": ("User: a\n\nAssistant:\n\nUser: c\n\nAssistant: \n\nUser: d\n\nAssistant: e", [" e"]),
    "the model begins": ("Assistant: a\n\nUser: b\n\nAssistant: c", [" a\n\n", " c"]),
    "the document's last line end": ("User: a\n\nAssistant: b\n\n", [" b\n\n"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARNED)
def test_answers_and_their_ends_are_learned(case):
    text, learned = LEARNED[case]
    row = {"text": text}
    assert learned_of(row, mask="qa", blank_lines="keep") == learned
    assert learned_of(row, mask="none", blank_lines="keep") is learned_of(row, mask="pad") is None


@pytest.mark.parametrize(
    "text",
    [
        "An article.",
        "User: a",
        "User：a\n\nAssistant：b",
        "A: x\n\nB: y",
        "user: a\n\nassistant: b",
        "User: a\n\nAssistant: \n",
    ],
)
def test_a_text_without_an_answer_has_nothing_to_learn(text):
    assert spans(text, part(mask="qa")) == ()
    with pytest.raises(Unusable, match=r"has nothing that mask = qa would learn"):
        read({"text": text}, part(mask="qa"))


def test_messages_may_be_left_out():
    messages = [
        message("user", "a"), message("assistant", "b", weight=0), message("user", "c", weight=0),
        message("assistant", "d", weight=1), message("assistant", "e", weight=0),
    ]  # fmt: skip
    row = {"messages": messages}
    assert learned_of(row, mask="qa") == [" d\n\n"]
    assert learned_of(row) == ["User: a\n\nAssistant:", "User:", "Assistant: d\n\nAssistant:"]
    assert learned_of(row, mask="se", marks=("c", "User:")) == [" a\n\nAssistant:"]
    with pytest.raises(Unusable, match="has nothing that mask = qa would learn"):
        read({"messages": messages[:3]}, part(mask="qa"))


@pytest.mark.parametrize(
    ("marks", "text", "learned"),
    [
        (("\n\n", "Ann:"), "Bob: a\n\nAnn: b\n\nBob: c\n\nAnn: d", [" b\n\n", " d"]),
        (("User:", "Assistant:"), "User: a\n\nAssistant: b\n\nUser: c", [" b\n\nUser:"]),
        (("]", "["), "a [b [c] d] e [", ["b ", "c]"]),
        (("</a>", "<a>"), "x</a>y<a></a>", ["</a>"]),
        (("=", "=="), "a==b=c", ["b="]),
        (("é", "你"), "你好é你", ["好é"]),
    ],
)
def test_marks(marks, text, learned):
    assert learned_of({"text": text}, mask="se", marks=marks) == learned


def test_marks_that_are_not_there_leave_nothing():
    with pytest.raises(Unusable, match="has nothing that mask = se would learn"):
        read({"text": "a > b"}, part(mask="se", marks=(">", "<")))
    with pytest.raises(ValueError, match="marks are two, but both are 'x'"):
        part(mask="se", marks=("x", "x"))


def test_training_has_what_a_chat_sends():
    assert one_turn is one_turn_of_chat
    assert {turn.role for turn in turns(CHAT)} == {"User", "Assistant"} < set(ROLES)


KEYS = [
    "text", "messages", "conversations", "system", "tools", "instruction", "input", "output", "prompt", "completion",
    "question", "answer", "weight", "role", "from", "content", "value", "type", "tool_calls", "function_call", "function",
    "name", "arguments", "reasoning_content", "thinking",
]  # fmt: skip
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "assistant", "tool", "{}", "[]", "x"])
)
anything = st.recursive(
    VALUES | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
message_like = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "function_call"])},
    optional={key: anything for key in ("content", "tool_calls", "function_call", "thinking", "weight")},
)
row_like = st.dictionaries(st.sampled_from(KEYS[:13]), anything, max_size=6) | st.fixed_dictionaries(
    {"messages": st.lists(message_like, min_size=1, max_size=3)}, optional={"tools": anything, "system": anything}
)


@settings(deadline=None, max_examples=300)
@given(fields=row_like, mask=st.sampled_from(["none", "qa"]))
def test_any_row_becomes_a_text_or_is_unusable(fields, mask):
    try:
        text, learned, weight = read(fields, part(mask=mask))
    except Unusable:
        return
    assert text.encode().strip()
    assert 0 < weight < float("inf")
    assert learned is None or all(0 <= a < b <= len(text) for a, b in learned)


SCRAPS = ["a", "Hello.", "你好。", "…", "🪿", ":** x", "：", " ", "\n", "\n\n", "\n \n", "\r\n", "User:", "\n\nUser: x",
          "\n\nAssistant:", "Q: a", "\n\nInput: b", "\u3000", "é", "<think>t</think>"]  # fmt: skip
contents = st.lists(st.sampled_from(SCRAPS), max_size=6).map("".join)
conversations = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=6)


@settings(deadline=None, max_examples=400)
@given(conversation=conversations, keep=st.booleans())
def test_of_any_conversation_the_answers_and_their_ends_are_learned(conversation, keep):
    """What is learned, character by character, from the turns themselves; not by looking for roles in the text."""
    names = {"system": "System", "user": "User", "assistant": "Assistant"}
    settings = {"blank_lines": "keep" if keep else "collapse"}
    row = {"messages": [message(role, content) for role, content in conversation]}
    try:
        made = read(row, part(mask="qa", **settings))
    except Unusable:
        assert not any(role == "assistant" and content.strip() for role, content in conversation)
        return
    flags, text = [], ""
    for i, (role, content) in enumerate(conversation):
        last = i == len(conversation) - 1
        alone = text_of({"messages": [message(role, content)]}, **settings)
        head = f"{names[role]}:"
        assert alone.startswith(head)
        assert alone[len(head) :].strip() == alone[len(head) :][1:]
        if not keep:
            assert alone[len(head) :].strip() == one_turn(content)
        rest = alone[len(head) :] + ("" if last else "\n\n")
        learned = role == "assistant" and content.strip() != ""
        flags += [False] * len(head) + [learned] * len(rest)
        text += head + rest
    assert made.text == text
    assert [any(a <= i < b for a, b in made.learned) for i in range(len(text))] == flags
    assert all(a < b for a, b in made.learned)
    assert all(b < a for (_, b), (a, _) in zip(made.learned, made.learned[1:], strict=False))
    again = read({"text": made.text}, part(mask="qa", **settings))
    assert again == made
