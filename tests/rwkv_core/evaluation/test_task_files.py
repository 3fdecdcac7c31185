"""Files of the public sets' forms, as they are published, and what a model makes of them."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_models import make

from rwkv_core.errors import InputError
from rwkv_core.evaluation.choices import Choice
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.task_files import Passage, measure, read
from rwkv_core.tokenizer import bytes_tokenizer

ARC = {
    "id": "Mercury_7175875",
    "question": "Which is a mammal?",
    "choices": {"text": ["a trout", "a bat"], "label": ["A", "B"]},
    "answerKey": "B",
}
HELLASWAG = {
    "ind": 14, "activity_label": "Wakeboarding", "ctx_a": "A man is being pulled.", "ctx_b": "the man",
    "ctx": "A man is being pulled. the man", "endings": ["falls [step] off.", "sings [title] a song."], "label": "0",
}  # fmt: skip
MMLU = {"question": "What is 2 + 2? ", "subject": "mathematics", "choices": ["1", "2", "3", "4"], "answer": 3}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"text": "It was the best of times"}, Passage("It was the best of", "times")),
        (ARC, Choice("Question: Which is a mammal?\nAnswer:", ("a trout", "a bat"), 1)),
        (
            {"id": "1", "answerKey": "2", "question": {
                "stem": "Which is a mammal?",
                "choices": [{"text": "a trout", "label": "1"}, {"text": "a bat", "label": "2"}]}},
            Choice("Question: Which is a mammal?\nAnswer:", ("a trout", "a bat"), 1),
        ),
        (HELLASWAG, Choice("Wakeboarding: A man is being pulled. The man", ("falls off.", "sings. a song."), 0)),
        (
            {"ctx": "A man is being pulled.", "endings": ["He falls.", "He sings."], "label": 1},
            Choice("A man is being pulled.", ("He falls.", "He sings."), 1),
        ),
        (MMLU, Choice("What is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", ("A", "B", "C", "D"), 3)),
        ({"query": "Q: 2 + 2\nA:", "choices": ["4", "5"], "gold": 0}, Choice("Q: 2 + 2\nA:", ("4", "5"), 0)),
        ({"question": "2 + 2?", "choices": ["1", "4"], "answer": "4"}, Choice("Question: 2 + 2?\nAnswer:", ("1", "4"), 1)),
        ({"question": "2 + 2?", "choices": ["1", "4"], "label": "1"}, Choice("Question: 2 + 2?\nAnswer:", ("1", "4"), 0)),
        ({"question": "谁？", "choices": ["猫", "象"], "answer": "B"}, Choice("Question: 谁？\nAnswer:", ("猫", "象"), 1)),
    ],
)  # fmt: skip
def test_a_row_is_asked_as_lm_eval_asks_it(row, asked, tmp_path):
    assert read(written(tmp_path / "x.jsonl", row)) == [asked]


def test_hellaswag_is_read_as_lm_eval_reads_it(tmp_path):
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    rows = [
        HELLASWAG,
        {**HELLASWAG, "ctx_a": "[header] How to  sail [title] Find a boat.", "ctx_b": "", "label": "1"},
    ]
    wanted = process_docs(Dataset.from_list(rows))
    assert read(written(tmp_path / "x.jsonl", *rows)) == [
        Choice(row["query"], tuple(row["choices"]), row["gold"]) for row in wanted
    ]


def test_files_of_every_kind(tmp_path):
    rows = [{"question": f"{i}?", "choices": ["a", "b,\nc"], "answer": i % 2} for i in range(3)]
    wanted = read(written(tmp_path / "x.jsonl", *rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read(tmp_path / "x.json") == wanted == read(tmp_path / "x.parquet")
    with (tmp_path / "passages.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], ["1", "one two"], ["2", "three, four"]])
    assert read(tmp_path / "passages.csv") == [Passage("one", "two"), Passage("three,", "four")]


def test_mmlu_s_own_files_have_no_header(tmp_path):
    path = tmp_path / "anatomy_test.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["What is\n2 + 2?", "1", "2", "3", "4", "D"], ["A bone?", "yes", "no", "x", "y", "A"]]
        )
    asked = read(path)
    assert asked[0] == Choice("What is\n2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", ("A", "B", "C", "D"), 3)
    assert asked[1].right == 0
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(["What?", "1", "2", "A"])
    with pytest.raises(InputError, match=r"anatomy_test\.csv:4: 4 columns"):
        read(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Which?", "choices": ["a", "b"], "answer": 2}, "answer = 2: must be the number of a choice"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": "C"}, "answer = 'C': must be"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": True}, "answer = True: must be"),
        ({"question": "Which?", "choices": ["a", "b"]}, "has none of answer, gold, label, answerKey"),
        ({"question": "Which?", "choices": ["a"], "answer": 0}, "choices: must be a list of two texts or more"),
        ({"question": "Which?", "choices": "ab", "answer": 0}, "choices: must be a list"),
        ({"question": "Which?", "choices": ["a", 1], "answer": 0}, "choices = 1: must be a text"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "question = ' ': must be a text"),
        ({**ARC, "choices": {"text": ["a", "b"], "label": ["A"]}}, "must have a label for each text"),
        ({"text": "word"}, "'word': must have a last word"),
        ({"text": "ends in a blank "}, "must have a last word"),
        ({"prompt": "x"}, "fields 'prompt': are of no known form"),
        ({"text": "of another kind"}, "is of another kind than the rows before it"),
    ],
)  # fmt: skip
def test_a_faulty_row_is_named_by_its_line(row, said, tmp_path):
    path = written(tmp_path / "x.jsonl", ARC, ARC, row)
    with pytest.raises(InputError) as error:
        read(path)
    assert error.value.value == f"{path}:3"
    assert said in str(error.value)


def test_faulty_files_are_told(tmp_path):
    with pytest.raises(InputError, match="no file of questions is there"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="has no rows"):
        read(written(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(InputError, match=r"x\.jsonl:2:\d+: .*is not JSON"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.txt").write_text("a b")
    with pytest.raises(InputError, match=r"\.txt: read are"):
        read(tmp_path / "x.txt")


def log_p(model, before, after):
    """Of the characters of `after` behind `before` and token 0, one after the other."""
    tokens = [0, *(before + after).encode()]
    with torch.no_grad():
        logits, _ = model(torch.tensor([tokens]))
    each = torch.log_softmax(logits[0].double(), -1)[range(len(tokens) - 1), tokens[1:]]
    return each[-len(after.encode()) :].sum().item()


def test_accuracies_by_hand(tmp_path):
    model = make(vocab_size=256, seed=1).eval()
    reader = Reader(model, bytes_tokenizer(), ctx_len=8, batch=4)
    rng = np.random.default_rng(0)
    letters = list("abcdefg ")

    def text(n):
        return "x" + "".join(rng.choice(letters, n)) + "y"

    asked = [
        Choice(text(9), tuple(text(int(n)) for n in rng.integers(1, 7, 4)), int(rng.integers(4))) for _ in range(40)
    ]
    found = measure(reader, asked)
    each = [[log_p(model, one.context, " " + choice) for choice in one.choices] for one in asked]
    assert found["acc"].total.tolist() == [np.argmax(x) == one.right for x, one in zip(each, asked, strict=True)]
    by_length = [np.divide(x, [len(choice) for choice in one.choices]) for x, one in zip(each, asked, strict=True)]
    assert found["acc_norm"].total.tolist() == [
        np.argmax(x) == one.right for x, one in zip(by_length, asked, strict=True)
    ]
    assert found["acc"].total.tolist() != found["acc_norm"].total.tolist()
    passages = [Passage(text(7), text(3)) for _ in range(5)]
    nats = measure(reader, passages)["log_perplexity"].total
    np.testing.assert_allclose(nats, [-log_p(model, one.context, " " + one.word) for one in passages], rtol=1e-5)
