import re
from typing import get_args

import pytest
from project import ROOT
from pydantic import BaseModel
from ruamel.yaml import YAML

from rwkv_core.errors import InputError
from tasks.params import Params, load


@pytest.fixture
def edited(tmp_path):
    """The repository's params.yaml with some text replaced, as a path."""

    def edit(*replacements):
        text = (ROOT / "params.yaml").read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return edit


@pytest.fixture
def set_train(edited):
    """The same with settings of train, and of adapter, as a path."""

    def change(train, **adapter):
        path, yaml = edited(), YAML()
        params = yaml.load(path.read_text())
        params["train"].update(train)
        params["adapter"].update(adapter)
        with path.open("w") as file:
            yaml.dump(params, file)
        return path

    return change


def message(path):
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value)


def test_the_repository_s_own_file_is_valid():
    assert load(ROOT / "params.yaml").adapter.kind == "lora"


def test_every_mistake_is_reported_at_once(edited):
    text = message(
        edited(
            ("rank: 16", "rnak: 16"),
            ("fraction: 0.1", "fraction: 1.5"),
            ("lr: 0.002", "lr: fast"),
            ("seed: 42", "seed: -1"),
        )
    )
    assert "5 mistakes" in text
    assert "adapter.rnak = 16: there is no such setting; did you mean adapter.rank?" in text
    assert "adapter.rank: is missing; add it (Rank of what is trained beside a matrix.)" in text
    assert "data.holdout.fraction = 1.5: should be less than 1" in text
    assert "train.optimizer.lr = 'fast': should be a valid number" in text
    assert "seed = -1: should be greater than or equal to 0" in text


def test_each_mistake_has_value_rule_and_remedy(edited):
    lines = message(edited(("kind: lora", "kind: lroa"), ("schedule: cosine", "schedule: cos"))).splitlines()[1:]
    assert len(lines) == 2
    for line in lines:
        value, _, rest = line.strip().partition(": ")
        rule, _, remedy = rest.partition("; ")
        assert value
        assert rule
        assert remedy


def test_mistakes_in_a_section_of_several_kinds_are_named_without_the_kind(edited):
    text = message(edited(("dropout: 0.0", "dropout: 1.5"), ("layers: all", "layers: [0]"), ("also: []", "also: [3]")))
    assert "adapter.dropout = 1.5: should be less than 1; change it (Probability of zeroing" in text
    assert "adapter.layers = [0]: should be a valid string" in text
    assert "adapter.also.0 = 3: should be a valid string" in text
    assert "adapter: tag 'lroa' found using 'kind' does not match any of the expected tags: 'lora', 'pissa'" in message(
        edited(("kind: lora", "kind: lroa"))
    )
    others = message(edited(("kind: lora", "kind: bone")))
    names = "layers, state, load, targets"
    assert f"adapter.alpha = 32: there is no such setting; remove it; the names here are {names}" in others


def test_a_name_unlike_any_lists_what_there_is(edited):
    assert (
        "the names here are source, tokenizer, special_tokens, parts, refused, holdout, processes, cluster"
        in message(edited(("  holdout:", "  zzz: 1\n  holdout:")))
    )


@pytest.mark.parametrize("section", ["data", "adapter", "train", "evaluate", "export", "promote", "tracking", "model"])
def test_a_missing_section_is_named(edited, section):
    text = (ROOT / "params.yaml").read_text()
    start = text.index(f"\n{section}:")
    end = text.find("\n\n", start + 1)
    path = edited()
    path.write_text(text[:start] + (text[end:] if end > 0 else ""))
    assert f"{section}: is missing" in message(path)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("schedule: cosine", "schedule: constant", "lr_final"),
        ("betas: [0.9, 0.99]", "betas: [0.9, 1.0]", "betas"),
        ("ctx_len: 256", "ctx_len: 1", "ctx_len"),
        ("formats: [pth, st, gguf]", "formats: []", "formats"),
        ("formats: [pth, st, gguf]", "formats: [pth, pth]", "formats"),
        ("gguf: [f16]", "gguf: [f16, f16]", "gguf names one twice"),
        ("gguf: [f16]", "gguf: [q4_0]", "export.gguf"),
        ("part_gb: 5", "part_gb: 0", "part_gb"),
        ("lr_final: 0.0002", "lr_final: 0.02", "lr_final"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(edited, old, new, found):
    assert found in message(edited((old, new)))


@pytest.mark.parametrize(
    ("train", "found"),
    [
        (
            {},
            "train.rows = stream: adapter.state stands at a document's beginning, and these rows begin anywhere; set pad",
        ),
        (
            {"rows": "magic_prime", "order": "as_given"},
            "train.rows = magic_prime: adapter.state stands at a document's",
        ),
        (
            {"rows": "pack", "carry_state": True},
            "train.carry_state = true: adapter.state stands .* first would .*; set false",
        ),
        ({"rows": "chunk"}, "train.carry_state = false: adapter.state stands .* begin from nothing; set true"),
        ({"rows": "pad"}, None),
        ({"rows": "only", "micro_batch": 1}, None),
        ({"rows": "pack"}, None),
        ({"rows": "chunk", "carry_state": True}, None),
    ],
)
def test_a_state_stands_before_documents_alone(train, found, set_train):
    path = set_train(train, state="wkv")
    if found is None:
        assert load(path).adapter.state == "wkv"
    else:
        assert re.match(found, message(path))


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ({"epochs": None}, "one of epochs, steps and tokens says when to stop, .*; here: epochs null, steps null, tokens null"),
        ({"steps": 3}, "one of epochs, .*; here: epochs 2.0, steps 3, tokens null"),
        ({"rows": "only"}, "rows = only has one row a micro-batch, but micro_batch is 8; pad has more"),
        ({"carry_state": True}, "carry_state is of rows = pack and chunk; rows is stream, where nothing goes on"),
        ({"rows": "pad", "carry_state": True}, "carry_state is of rows = pack and chunk; rows is pad"),
        ({"order": "similar_lengths"}, "order = similar_lengths has no effect on rows = stream, which can have shuffled, "),
        ({"rows": "pack", "order": "long_first"}, "order = long_first has no effect on rows = pack, which can have"),
        (
            {"rows": "chunk", "carry_state": True, "order": "similar_lengths"},
            "order = similar_lengths has no effect on rows = chunk with carry_state, which can have shuffled, as_given",
        ),
        ({"rows": "magic_prime"}, "order = shuffled has no effect on rows = magic_prime, which can have as_given"),
        (
            {"rows": "magic_prime", "order": "as_given", "mix": {"a": "2x"}},
            "rows = magic_prime goes once through all documents as they lie, and mix must be {}",
        ),
        (
            {"rows": "only", "micro_batch": 1, "order": "similar_lengths"},
            "order = similar_lengths is of rows that share a step; micro_batch [*] accumulate is 1",
        ),
        ({"mix": {"a": "0x"}}, "mix.a = 0x is none of it; leave the part out"),
        ({"mix": {"a": "40%", "b": "60%"}}, "the shares in mix are 100 % or more"),
        ({"mix": {"a": "3"}}, "train.mix.a = '3': "),
        ({"mix": {"a": "-3x"}}, "train.mix.a = '-3x': "),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense_are_refused(train, found, set_train):
    assert re.search(found, message(set_train(train)))


def test_orders_and_mixes_that_make_sense(set_train):
    for rows, more in (("pad", {}), ("chunk", {}), ("only", {"micro_batch": 1, "accumulate": 4})):
        for order in ("shuffled", "similar_lengths", "short_first", "long_first", "as_given"):
            assert load(set_train({"rows": rows, "order": order, **more})).train.order == order
    mix = {"a": "10%", "b": "3x", "c": "0.5x"}
    assert load(set_train({"mix": mix, "epochs": None, "tokens": 1000})).train.mix == mix


def test_yaml_that_does_not_parse_names_the_place(edited):
    text = message(edited(("seed: 42", "seed: [42")))
    assert "is not YAML" in text
    assert "line" in text


def test_a_key_given_twice_is_refused(edited):
    assert "seed" in message(edited(("seed: 42", "seed: 42\nseed: 43")))


def test_an_empty_or_absent_file_is_an_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert "seed: is missing" in message(tmp_path / "empty.yaml")
    assert "run this in the repository's root" in message(tmp_path / "none.yaml")


def test_every_setting_says_what_it_means():
    def fields(model):
        for name, field in model.model_fields.items():
            kinds = get_args(field.annotation) if field.discriminator else (field.annotation,)
            if all(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
                for kind in kinds:
                    yield from ((f"{name}.{inner}", f) for inner, f in fields(kind))
            else:
                yield name, field

    silent = [name for name, field in fields(Params) if not field.description and name.split(".")[-1] != "kind"]
    assert not silent
