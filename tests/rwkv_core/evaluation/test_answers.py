"""Questions of held-out rows, as preparation leaves them; and what answers are worth, by hand and by torchmetrics."""

import json

import numpy as np
import pytest
from data_settings import data, part
from random_models import make

from rwkv_core.data.binidx import Documents
from rwkv_core.data.prepare import prepare
from rwkv_core.evaluation.answers import Question, exact_match, f1, judge, options, questions, words
from rwkv_core.evaluation.form import ends, one_turn, plain_colons
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.subject import Said
from rwkv_core.generation.text import Continuation
from rwkv_core.models.state import State
from rwkv_core.tokenizer import world

ENGLISH = [
    ("The cat sat on the mat.", "a cat sat on a mat"),
    ("New York", "new york city"),
    ("It is 42!", "42"),
    ("no idea", "Paris"),
    ("the the the dog dog", "dog dog dog"),
    ("U.S. Army", "US Army"),
    ("", "Paris"),
]


@pytest.mark.parametrize(("given", "right"), ENGLISH)
def test_english_answers_are_compared_as_squad_does(given, right):
    from torchmetrics.text import SQuAD

    wanted = SQuAD()(
        [{"prediction_text": given, "id": "1"}], [{"answers": {"answer_start": [0], "text": [right]}, "id": "1"}]
    )
    assert exact_match(given, right) == wanted["exact_match"] / 100
    assert f1(given, right) == pytest.approx(float(wanted["f1"]) / 100)


def test_chinese_answers_are_compared_by_character():
    """By hand: 4 characters shared, of 5 given and of 6 right: 2 * 4 / (5 + 6)."""
    assert words("《红楼梦》，曹雪芹 写于 about 1750 年。") == [*"红楼梦曹雪芹写于", "about", "1750", "年"]
    assert exact_match("曹雪芹。", "曹雪芹") == 1
    assert exact_match("曹雪芹写的", "曹雪芹") == 0
    assert f1("北京大学里", "北京的大学城") == pytest.approx(8 / 11)
    assert f1("他在1990年 graduated", "1990年") == pytest.approx(2 * 2 / (5 + 2))
    assert f1("北京", "上海") == 0


def test_an_answer_without_words_is_right_where_nothing_else_is_asked():
    assert f1("the", "...") == exact_match("the", "...") == 1
    assert f1("the", "x") == 0


@pytest.mark.parametrize(
    ("question", "answer", "choices"),
    [
        ("Which is it?\nA. a cat\nB. a dog\nC. an owl", "B", ("A", "B", "C")),
        ("Which is it?\nA. a cat\nB. a dog", "B.", ("A.", "B.")),
        ("Which is it?\n(A) a cat\n(B) a dog", "(A)", ("(A)", "(B)")),
        ("Which is it?\nA) a cat\nB) a dog", "a dog", ("a cat", "a dog")),
        ("Which is it?\n A: a cat \n B: a dog", "B: a dog", ("A: a cat", "B: a dog")),
        ("是什么？\nA、猫\nB、狗", "A、猫", ("A、猫", "B、狗")),
        ("是什么？\n（A）猫\n（B）狗", "B. 狗", ("A. 猫", "B. 狗")),
        ("Which is it?\nA. a cat\nB. a dog", "It is B", ()),
        ("Which is it?\nA. a cat\nC. a dog", "A", ()),
        ("Which is it?\nA. a cat", "A", ()),
        ("Which is it?\nA. same\nB. same", "same", ()),
        ("Which is it?", "A", ()),
    ],
)
def test_choices_are_read_from_the_question(question, answer, choices):
    assert options(question, answer) == choices


def held_out(folder, rows, **changes):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    prepare(data(folder / "rows.jsonl", part(**changes), fraction=0.5), folder / "made", folder / "work")
    return Documents(folder / "made" / "valid")


def test_every_learned_answer_of_a_dialogue_is_asked_for(tmp_path):
    rows = [
        {"messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"How much is {i}?\nA. {i}\nB. {i + 1}"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "Not this.", "weight": 0},
            {"role": "user", "content": "And twice?"},
            {"role": "assistant", "content": f"{2 * i}：真的"}]}
        for i in range(30)
    ]  # fmt: skip
    documents = held_out(tmp_path, rows, mask="qa")
    asked = questions(documents, world(), 5, 0)
    assert len({question.document for question in asked}) == 5
    assert [question.document for question in asked] == sorted(question.document for question in asked)
    assert len(asked) == 10
    first, second = asked[:2]
    number = first.prompt.split("How much is ")[1].split("?")[0]
    assert first == Question(
        first.document, f"System: Be kind.\n\nUser: How much is {number}?\nA. {number}\nB. {int(number) + 1}\n\nAssistant:",
        "A", " ", ("\n\nUser:", "\n\nHuman:"), ("A", "B"),
    )  # fmt: skip
    assert second.prompt.startswith(first.prompt + " A\n\nUser: And then?\n\nAssistant: Not this.\n\nUser: And twice?")
    assert second.answer == f"{2 * int(number)}：真的"
    assert second.choices == ()
    assert asked == questions(documents, world(), 5, 0) != questions(documents, world(), 5, 1)
    assert len(questions(documents, world(), 10**6, 0)) == 2 * len(documents)


def test_forms_of_other_families(tmp_path):
    rows = [{"instruction": f"Count to {i}.", "output": f"I count to {i} now."} for i in range(8)]
    (question, *_) = questions(held_out(tmp_path, rows), world(), 1, 0)
    assert question.prompt.startswith("Instruction: Count to ")
    assert question.prompt.endswith("\n\nResponse:")
    assert question.stop == ("\n\nInstruction:", "\n\nInput:")


def test_without_turns_the_learned_stretches_are_the_answers(tmp_path):
    rows = [{"text": f"<ask>{i} and {i}<say>{2 * i}, I say<end>"} for i in range(12)]
    documents = held_out(tmp_path, rows, mask="se", marks=("<end>", "<say>"))
    asked = questions(documents, world(), 4, 0, marks=("<end>",))
    for question in asked:
        number = int(question.prompt.removeprefix("<ask>").split()[0])
        assert question.prompt == f"<ask>{number} and {number}<say>"
        assert (question.answer, question.delimiter, question.stop) == (f"{2 * number}, I say", "", ("<end>",))


def test_a_text_that_asks_nothing_has_no_questions(tmp_path):
    asked = questions(held_out(tmp_path, [{"text": f"Once there were {i} birds."} for i in range(9)]), world(), 4, 0)
    assert asked == []
    assert judge(reader(), asked, 8) == {"answers": {}, "format": {}}


def test_answers_that_recur_are_choices(tmp_path):
    rows = [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes, it is"} for i in range(60)]
    assert {q.choices for q in questions(held_out(tmp_path, rows), world(), 30, 0)} == {("no", "yes, it is")}


def reader(**changes):
    return Reader(make(vocab_size=65536, n_layer=1, **changes).eval(), world(), ctx_len=16, batch=4)


def test_what_answers_are_worth(tmp_path, monkeypatch):
    """The answers are given here; each document counts once, whatever the number of its questions."""
    asked = [
        Question(3, "User: A?\n\nAssistant:", "a big cat", " ", ("\n\nUser:",), ()),
        Question(3, "User: A?\n\nAssistant: a\n\nUser: B?\n\nAssistant:", "dog", " ", ("\n\nUser:",), ("dog", "cat")),
        Question(7, "Q: C?\n\nA:", "an owl", " ", ("\n\nQ:",), ("an owl", "a bat")),
    ]
    given = {
        asked[0].prompt: (" A cat.", "end"),
        asked[1].prompt: (" <think>cat?</think>\ndog", "stop"),
        asked[2].prompt: (" owl\nUser：who", "length"),
    }
    seen = []

    def answers(self, prompts, *, max_tokens, stop):
        seen.append((stop, max_tokens))
        return [Continuation(*given[prompt], State(), "") for prompt in prompts]

    monkeypatch.setattr(Reader, "answers", answers)
    found = judge(reader(), asked, 9)
    assert seen == [(("\n\nUser:",), 9), (("\n\nQ:",), 9)]
    scores = found["answers"]
    assert scores["exact_match"].total.tolist() == [1, 0]
    assert scores["exact_match"].weight.tolist() == [2, 1]
    np.testing.assert_allclose(scores["f1"].total, [2 / 3 + 1, 2 / 3])
    assert scores["choice_acc"].weight.tolist() == [1, 1]
    assert {name: items.total.tolist() for name, items in found["format"].items()} == {
        "ends": [2, 0], "one_turn": [2, 0], "plain_colons": [2, 0],
    }  # fmt: skip


def test_a_real_model_is_asked(tmp_path):
    rows = [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(40)]
    asked = questions(held_out(tmp_path, rows), world(), 12, 0)
    found = judge(reader(), asked, 5)
    assert {group: set(measures) for group, measures in found.items()} == {
        "answers": {"exact_match", "f1", "choice_acc", "choice_acc_norm"}, "format": {"ends", "one_turn", "plain_colons"},
    }  # fmt: skip
    assert {len(items.total) for measures in found.values() for items in measures.values()} == {12}
    assert 0 < found["answers"]["choice_acc"].mean() < 1


def test_forms_of_answers():
    assert [ends(Said("x", ending)) for ending in ("end", "stop", "length", "halted")] == [True, True, False, False]
    for text in (" 3\n\nAssistant: 4", "User: what?", " x\nSystem：y", " x\n  User : y"):
        assert not one_turn(Said(text, "end"))
    assert one_turn(Said(" the User: field is his", "end"))
    assert plain_colons(Said(" 3\n\nUser: 4", "end"))
    assert plain_colons(Said(" 他说：User：是", "end"))
    for text in ("User：你好", " 好的\nAssistant：是", "\n\nHuman：再见"):
        assert not plain_colons(Said(text, "end"))
