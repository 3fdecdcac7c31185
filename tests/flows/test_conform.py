"""`rwkvflow conform`: what it says of files, and how it ends."""

import json
import re
import shutil
import sys

import conformed
import pytest
import safetensors.torch
import torch

from flows import cli
from rwkv_core.conformance.check import PROMPTS
from rwkv_core.formats import gguf


@pytest.fixture
def conform(monkeypatch, capsys):
    """Runs it: the exit status, and what was said on each stream."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rwkvflow", "conform", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")  # else a table breaks its lines where a terminal ends
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def made():
    return conformed.model()


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """A model as a file of each form, and its state's."""
    folder = tmp_path_factory.mktemp("files")
    tuned = conformed.state(made)
    for form in ("pth", "st", "hf"):
        conformed.write(folder, made, form)
        conformed.write_state(folder, tuned, form)
    return folder


def test_a_good_file_is_computed_with_and_conforms(conform, folder):
    code, said, wrong = conform(folder / "model.pth", "--state", folder / "state.pth")
    assert (code, wrong) == (0, "")
    assert said.splitlines()[-1] == "conforms: pth (rwkv 0.8.32), pth state (rwkv 0.8.32)"
    for prompt in PROMPTS:
        assert said.count(f"rwkv 0.8.32: logits, {prompt}") == said.count(f"reference: logits, {prompt}") == 2
    assert "│ no  │" not in said


@pytest.mark.parametrize("form", ["pth", "st", "hf"])
def test_structure_runs_no_model(form, conform, folder):
    file = folder / ("model" if form == "hf" else f"model.{form}")
    code, said, _ = conform(file, "--structure", "--against", folder / "model.pth")
    assert (code, said.splitlines()[-1]) == (0, f"conforms: {form} (structure)")
    assert "logits" not in said


def test_json_is_for_programs(conform, folder):
    code, said, _ = conform(folder / "model.st", "--format", "json")
    verdict = json.loads(said)
    assert (code, verdict["passed"], verdict["mode"], verdict["conforms"]) == (0, True, "full", "st (reference)")
    [file] = verdict["files"]
    assert (file["file"], file["format"], file["reader"]) == ("model.st", "st", "reference")
    assert [row["prompt"] for row in file["logits"]] == list(PROMPTS)
    assert all(0 < row["difference"] < row["allowed"] and row["passed"] for row in file["logits"])
    assert file["findings"]
    assert all(finding["passed"] for finding in file["findings"])


def test_markdown_is_for_reports(conform, folder):
    code, said, _ = conform(folder / "model.st", "--structure", "--format", "markdown")
    assert code == 0
    assert said.startswith("# Conformance\n")
    assert "| yes | model.st | st | structure |" in said
    assert "What is wrong" not in said
    assert "**no**" not in said


def damaged(folder, form, change, tmp_path):
    """The file of a form, its tensors changed as if its writer had written them so."""
    if form == "pth":
        tensors = torch.load(folder / "model.pth")
        change(tensors, "blocks.1.att.key.weight")
        torch.save(tensors, tmp_path / "bad.pth")
        return tmp_path / "bad.pth"
    path, file, key = tmp_path / "bad.st", folder / "model.st", "blocks.1.att.key.weight"
    if form == "hf":
        path = tmp_path / "bad"
        shutil.copytree(folder / "model", path)
        path, file, key = path / "model.safetensors", path / "model.safetensors", "model.layers.1.attn.k_proj.weight"
    tensors = safetensors.torch.load_file(file)
    change(tensors, key)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path.parent if form == "hf" else path


def turn(tensors, key):
    tensors[key] = tensors[key].mT.contiguous()


def drop(tensors, key):
    del tensors[key]


def add(tensors, key):
    tensors["blocks.0.att.time_state"] = torch.zeros(2, 64, 64)


def overflow(tensors, key):
    tensors[key][3, 4] = float("inf")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (turn, "values are the model's: blocks.1.att.key.weight is not turned as the format wants it"),
        (drop, "no tensor is missing: (blocks.1.att.key|model.layers.1.attn.k_proj).weight"),
        (add, "no tensor is left over: blocks.0.att.time_state"),
        (overflow, "finite: blocks.1.att.key.weight has 1"),
    ],
)
@pytest.mark.parametrize("form", ["pth", "st", "hf"])
def test_a_bad_file_ends_with_1_and_its_fault_is_named(form, change, told, conform, folder, tmp_path):
    path = damaged(folder, form, change, tmp_path)
    against = ("--structure", "--against", folder / "model.pth")
    code, said, _ = conform(path, *against)
    assert (code, said.splitlines()[-1]) == (1, "conforms: none")
    assert re.search(f"^{path.name}: {told}", said, re.MULTILINE), said
    code, said, _ = conform(path, *against, "--format", "json")
    verdict = json.loads(said)
    assert (code, verdict["passed"], verdict["conforms"], verdict["files"][0]["passed"]) == (1, False, "none", False)
    code, said, _ = conform(path, *against, "--format", "markdown")
    assert code == 1
    assert f"| **no** | {path.name} |" in said
    assert re.search(f"## What is wrong\n\n- {path.name}: {told}", said), said


def test_a_file_that_is_none_ends_with_1(conform, folder, tmp_path):
    path = tmp_path / "half.st"
    path.write_bytes((folder / "model.st").read_bytes()[:-1000])
    code, said, _ = conform(path, "--structure", "--against", folder / "model.pth")
    assert code == 1
    assert "half.st: clients can read it: it " in said


def test_logits_alone_tell(conform, folder):
    """All tensors are right, and the model is one of another epsilon than clients have."""
    right = ("--against", folder / "model.pth", "--format", "json")
    code, said, _ = conform(folder / "model.st", *right, "--head-size-divisor", "1")
    [file] = json.loads(said)["files"]
    assert code == 1
    assert all(finding["passed"] for finding in file["findings"])
    assert not any(row["passed"] for row in file["logits"])


def test_a_bad_state_of_a_good_model(conform, folder, tmp_path):
    """One file of two is enough."""
    tensors = torch.load(folder / "state.pth")
    torch.save(dict(list(tensors.items())[:1]), tmp_path / "short.pth")
    code, said, _ = conform(folder / "model.pth", "--state", tmp_path / "short.pth", "--structure")
    assert (code, said.splitlines()[-1]) == (1, "conforms: pth (structure)")
    assert "short.pth: as many states as blocks: 1 (must be: 2" in said


@pytest.mark.parametrize(("vocabulary", "code"), [("World's", 0), ("another end of a turn", 1)])
def test_a_gguf_and_its_tokens(vocabulary, code, conform, tmp_path, monkeypatch):
    made = conformed.model(vocab_size=65536)
    if code:
        monkeypatch.setattr(gguf, "EOT", 0)
    path = conformed.write(tmp_path, made, "f16")
    ended, said, _ = conform(path, "--structure")
    assert (ended, "eot 0 (must be: bos 0, eos 0, eot 261" in said) == (code, bool(code)), said


def test_what_cannot_be_checked_is_said(conform, folder):
    model = folder / "model.pth"
    code, said, wrong = conform(folder / "none.pth")
    assert (code, said) == (1, "")
    assert wrong.startswith(f"rwkvflow: {folder / 'none.pth'}: nothing is there")
    code, _, wrong = conform(model, "--state", folder / "none.pth")
    assert (code, "none.pth: nothing is there" in wrong) == (1, True)
    code, _, wrong = conform(folder / "model.st", "--lora", model, "--alpha", "8")
    assert (code, "say --against the merged model" in wrong) == (1, True)
    code, _, wrong = conform(model, "--format", "xml")
    assert (code, "xml" in wrong) == (2, True)
