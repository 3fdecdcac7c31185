"""`rwkvflow data`: what make_data.py is told and says, and the preview in the terminal."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from flows import cli
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.tokenizer import END, world

ROOT = Path(__file__).parent.parent.parent
TEXTS = ["User: hi\n\nAssistant: hello", "two", "a third text of more tokens"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "novel.v1.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def rwkvflow(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rwkvflow", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("words", [["data"], ["data", "make"]])
def test_the_trainer_is_told_its_numbers(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tokens = 10 * sum(len(world().encode(text)) + 1 for text in TEXTS)
    for ctx_len in (4, tokens // 3, tokens // 3 + 1):
        assert rwkvflow(monkeypatch, *words, "novel.v1.jsonl", "10", str(ctx_len)) == 0
        said = capsys.readouterr().out
        found = re.search(r"^--my_exit_tokens (\d+) --magic_prime (\d+|None) --ctx_len (\d+)$", said, re.MULTILINE)
        chunks = tokens // ctx_len - 1
        primes = [p for p in range(2, chunks + 1) if p % 3 == 2 and all(p % d for d in range(2, p))]
        assert found is not None
        assert found.groups() == (str(tokens), str(primes[-1] if primes else None), str(ctx_len))
        assert ("no magic prime" in said) == (tokens < 3 * ctx_len)
    assert sorted(x.name for x in folder.iterdir()) == ["novel.v1.bin", "novel.v1.idx", "novel.v1.jsonl"]
    assert len(Documents(folder / "novel.v1")) == 30


def test_json2binidx_names_its_files_as_the_tool_does(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert rwkvflow(monkeypatch, "data", "json2binidx", "novel.v1.jsonl", "--out", "sub/novel") == 0
    assert sorted(x.name for x in (folder / "sub").iterdir()) == ["novel_text_document.bin", "novel_text_document.idx"]
    documents = Documents(folder / "sub/novel_text_document")
    assert [world().decode(documents[i]) for i in range(3)] == TEXTS


def test_a_problem_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert rwkvflow(monkeypatch, "data", "none.jsonl", "10", "512") == 1
    assert capsys.readouterr().err.startswith("rwkvflow: none.jsonl: must be a .jsonl file")
    assert rwkvflow(monkeypatch, "data", "novel.v1.jsonl", "ten", "512") == 2
    assert rwkvflow(monkeypatch, "data", "preview") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("rwkvflow: params.yaml: ")


def test_the_preview_is_a_page_and_bars(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(ROOT / "params.yaml", folder)
    assert rwkvflow(monkeypatch, "data", "preview") == 1
    assert "a binidx is a .bin and an .idx; run the prepare stage" in capsys.readouterr().err
    (folder / "outputs/data").mkdir(parents=True)
    for side, count in (("train", 30), ("valid", 3)):
        writer = Writer(folder / "outputs/data" / side)
        for i in range(count):
            writer.add([*world().encode(TEXTS[0] * (i + 1)), END], None if i else np.zeros(9, bool))
        writer.close()
    (folder / "outputs/data/lints.csv").write_text(
        "code,where,character,message\nmojibake,novel.jsonl:7,3,read it again\n"
    )
    (folder / "outputs/data/manifest.json").write_text('{"source": {"path": "novel.jsonl"}}')
    assert rwkvflow(monkeypatch, "data", "preview", "--count", "4") == 0
    said = capsys.readouterr().out
    sizes = Documents(folder / "outputs/data/train").sizes
    assert f"train: 30 documents of {sizes.sum()} tokens; by length:" in said
    bars = re.findall(r"^  up to +(\d+)  (█*) (\d+)", said, re.MULTILINE)
    assert sum(int(documents) for _, _, documents in bars) == 30
    assert max(len(bar) for _, bar, _ in bars) == 40
    page = (folder / "preview.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 4  # the last is the longest
    assert "novel.jsonl:7" in page
    assert rwkvflow(monkeypatch, "data", "preview", "--side", "valid", "--out", "sub/v.html") == 0
    assert (folder / "sub/v.html").read_text(encoding="utf-8").count("<article>") == 3


def test_a_data_set_is_fetched_into_a_new_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert rwkvflow(monkeypatch, "data", "fetch", "owner/name", str(folder)) == 1
    assert f"{folder}: something is there already" in capsys.readouterr().err
