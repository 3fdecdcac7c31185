"""All that two models are asked: in one form, of both the same, and each once for the same bytes."""

import json

import numpy as np
import pytest
import torch
from data_settings import ROOT
from random_models import make

from rwkv_core import checkpoint
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.errors import InputError
from rwkv_core.evaluation import answers, memorised
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.measure import changes
from rwkv_core.evaluation.store import Store
from rwkv_core.evaluation.subject import Subject
from rwkv_core.evaluation.suite import Suite
from rwkv_core.tokenizer import bytes_tokenizer
from tasks.params import load

BYTES = bytes_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    for side in ("train", "valid"):
        writer = Writer(folder / side)
        for i in range(30):
            writer.add([*f"User: Is {i} even?\n\nAssistant: {'no' if i % 2 else 'yes'}, it {side}".encode(), 0])
        writer.close()
    for seed in range(2):
        checkpoint.write(folder / f"{seed}.pth", make(vocab_size=256, seed=seed).state_dict(), "fp32")
    rows = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(12)]
    (folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "last.jsonl").write_text(
        "".join(json.dumps({"text": f"It was the best of {i}"}) + "\n" for i in range(12))
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(
        "task: own\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/exam.jsonl}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
    )
    return folder


def settings(folder, **changes):
    values = load(ROOT / "params.yaml").evaluate
    asked = {
        "ctx_len": 16, "batch": 4, "answers": {"count": 11, "max_tokens": 3}, "tasks": {},
        "memorised": {"count": 13, "prompt": 6, "continuation": 2}, "lm_eval": None,
    }  # fmt: skip
    return type(values).model_validate(values.model_dump() | asked | changes)


def suite(folder, *, skip_first=False, say=lambda text: None, **changes):
    train, valid = (Documents(folder / side) for side in ("train", "valid"))
    of = settings(folder, **changes)
    return Suite(of, BYTES, valid, train, marks=(), seed=0, skip_first=skip_first, say=say)


def subject(folder, seed=0, store=None, **changes):
    return Subject(folder / f"{seed}.pth", BYTES, store=store, **changes)


def everything(folder):
    return {
        "tasks": {"exam": folder / "exam.jsonl", "last": folder / "last.jsonl"},
        "lm_eval": {"tasks": ["own"], "include": folder / "tasks", "limit": None, "num_fewshot": None},
    }


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def test_both_models_are_asked_the_same_and_compared(folder):
    asked = suite(folder, **everything(folder))
    base, tuned = (asked.ask(subject(folder, seed)) for seed in range(2))
    assert {group: set(measures) for group, measures in base.items()} == {
        "answers": {"exact_match", "f1", "choice_acc", "choice_acc_norm"},
        "format": {"ends", "one_turn", "plain_colons"},
        "memorised": {"verbatim"},
        "tasks": {"exam/acc", "exam/acc_norm", "last/acc", "last/log_perplexity"},
        "lm_eval": {"own/acc"},
    }  # fmt: skip
    sizes = {group: {len(x.total) for x in measures.values()} for group, measures in base.items()}
    assert sizes == {"answers": {11}, "format": {11}, "memorised": {13}, "tasks": {12}, "lm_eval": {12}}
    found = changes(base, tuned, resamples=200, confidence=0.95, seed=0)
    perplexity = found["tasks"]["last/log_perplexity"]
    assert perplexity["change"]["low"] <= perplexity["change"]["value"] <= perplexity["change"]["high"]
    assert perplexity["base"] != perplexity["tuned"]


def test_numbers_are_those_of_the_parts(folder):
    one = subject(folder)
    found, reader = suite(folder).ask(one), Reader(one.model, BYTES, ctx_len=16, batch=4)
    questions = answers.questions(Documents(folder / "valid"), BYTES, 11, 0)
    for group, measures in answers.judge(reader, questions, 3).items():
        for name, items in measures.items():
            assert found[group][name].total.tolist() == items.total.tolist()
            assert found[group][name].higher_is_better == items.higher_is_better
    passages = memorised.passages(Documents(folder / "train"), count=13, prompt=6, continuation=2, seed=0)
    assert (
        found["memorised"]["verbatim"].total.tolist() == memorised.recited(reader, passages)["verbatim"].total.tolist()
    )


def test_what_is_known_costs_no_loading(folder, tmp_path):
    store = Store(tmp_path / "scores")
    first = suite(folder, **everything(folder)).ask(subject(folder, store=store))
    again = subject(folder, store=store)
    second = suite(folder, **everything(folder)).ask(again)
    assert again._loaded is None
    for group, measures in first.items():
        for name, items in measures.items():
            np.testing.assert_array_equal(items.total, second[group][name].total)
            np.testing.assert_array_equal(items.weight, second[group][name].weight)
    for changed in (
        {"answers": {"count": 11, "max_tokens": 4}}, {"memorised": {"count": 13, "prompt": 7, "continuation": 2}},
        {"skip_first": True},
    ):  # fmt: skip
        other = subject(folder, store=store)
        suite(folder, **everything(folder) | changed).ask(other)
        assert other._loaded is not None


def test_a_changed_file_is_asked_again(folder, tmp_path):
    store, exam = Store(tmp_path / "scores"), tmp_path / "exam.jsonl"
    exam.write_text((folder / "exam.jsonl").read_text())
    asked = {"tasks": {"exam": exam}, "answers": None, "memorised": None}
    before = suite(folder, **asked).ask(subject(folder, store=store))["tasks"]["exam/acc"]
    exam.write_text(exam.read_text().replace('"answer": 1', '"answer": 0'))
    after = suite(folder, **asked).ask(subject(folder, store=store))["tasks"]["exam/acc"]
    assert (before.total[::2] == after.total[::2]).all()
    assert (before.total[1::2] == 1 - after.total[1::2]).all()


def test_a_state_is_mounted(folder, tmp_path):
    """And then the first token of what has nothing before it is scored of neither model."""
    generator = torch.Generator().manual_seed(0)
    state = {f"blocks.{i}.att.time_state": 3 * torch.randn(4, 8, 8, generator=generator) for i in range(3)}
    torch.save(state, tmp_path / "state.pth")
    asked = {"tasks": {"last": folder / "last.jsonl"}, "answers": None, "memorised": None, "skip_first": True}
    bare, mounted = (
        suite(folder, **asked).ask(subject(folder, state=at))["tasks"]["last/log_perplexity"].mean()
        for at in (None, tmp_path / "state.pth")
    )
    assert abs(bare - mounted) > 0.01


def test_what_can_t_be_measured_is_said(folder, tmp_path):
    said = []
    writer = Writer(tmp_path / "valid")
    writer.add([*b"Once there was a bird.", 0])
    writer.close()
    plain, of = Documents(tmp_path / "valid"), settings(folder)
    assert (
        Suite(of, BYTES, plain, plain, marks=(), seed=0, skip_first=False, say=said.append).ask(subject(folder)) != {}
    )
    assert said[0] == "no held-out row has a question: answers are not measured"
    long = settings(folder, memorised={"count": 1, "prompt": 90, "continuation": 10}, answers=None)
    assert (
        Suite(long, BYTES, plain, plain, marks=(), seed=0, skip_first=False, say=said.append).ask(subject(folder)) == {}
    )
    assert said[-1] == "no training row has 100 tokens: what is memorised is not measured"
    with pytest.raises(InputError, match="no file of questions"):
        suite(folder, tasks={"exam": tmp_path / "none.jsonl"})
