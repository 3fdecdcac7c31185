"""What the report and the card say of a model, from a folder laid out as a checkout is."""

import json
from pathlib import Path, PurePath

import pytest
from project import ROOT
from reports import COMPARISON

from rwkv_core.config import CardConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.texts import TEXTS
from tasks import card, stage
from tasks.evidence import evidence, facts, lineage, words
from tasks.params import load
from tasks.record import RunRecord

CARD = CardConfig(license=None, languages=(), base_model=None, datasets=())
SIDE = {"documents": 3, "tokens": 1500}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    """A checkout's outputs, as small as they can be."""
    record = RunRecord(
        id="x", digest="9ad9e949", started=0.0, seconds_trained=300.0, host="my-laptop",
        params=load(ROOT / "params.yaml").model_dump(mode="json"),
        base={"path": "/far/away/base.pth", "sha256": "b" * 64, "version": "7", "n_layer": 12, "n_embd": 768},
        data={"path": "/far/away/rows.jsonl", "sha256": "d" * 64}, git={"commit": "c" * 40, "branch": "main", "dirty": True},
        dvc_experiment={"name": "wide", "baseline": None}, prefect={}, versions={"python": "3.11", "torch": "2.13"},
    )  # fmt: skip
    outputs = tmp_path / stage.OUTPUTS
    record.write((outputs / "train").mkdir(parents=True) or outputs / "train")
    manifest = {
        "source": {"path": "/far/away/rows.jsonl", "rows": 924},
        "holdout": {"group": None},
        "train": SIDE,
        "valid": SIDE,
    }
    adapter = {"sha256": "a" * 64, "kind": "lora"}
    for path, values in {
        "data/manifest.json": manifest,
        "train/metrics.json": {"steps": 79, "tokens": 160_780, "peak_memory_mb": 1000},
        "merged/receipt.json": {"adapters": [adapter], "merged": {"sha256": "e" * 64}, "base": {"sha256": "b" * 64}},
        "evaluate/metrics.json": COMPARISON,
        "evaluate/receipt.json": {"base": {"sha256": "b" * 64}, "tuned": {"sha256": "e" * 64}},
        "evaluate/samples.json": [{"prompt": "q", "base": "a", "tuned": "b"}],
    }.items():
        write(outputs / path, json.dumps(values))
    write(outputs / "train/adapter.pth", "x" * 1000)
    write(outputs / "train/history.csv", "step,tokens,loss\n1,10,3.5\n2,20,2.5\n")
    write(outputs / "train/valid.csv", "step,loss\n2,2.25\n")
    write(outputs / "evaluate/documents.csv", "document,base_loss,tuned_loss\n0,3,2\n4,2,1\n")
    write(
        outputs / "evaluate/positions.csv",
        "from,to,tokens,base_loss,tuned_loss,change,low,high\n1,16,9,3,2,-1,-1.5,-0.5\n",
    )
    return tmp_path


def changed(root, **values):
    record = RunRecord.read(root / stage.TRAIN).model_copy(update=values)
    record.write(root / stage.TRAIN)
    return record


def english(rows):
    return {
        name.en: value if isinstance(value, PurePath | str) else value[0]
        for name, value in rows
        if not isinstance(value, int)
    }


def test_what_a_report_is_made_of(root):
    found = evidence(root, root / stage.EVALUATE)
    assert found.comparison == COMPARISON
    assert (found.train, found.valid) == ([(1, 3.5), (2, 2.5)], [(2, 2.25)])
    assert [column.tolist() for column in found.documents] == [[3, 2], [2, 1]]
    assert found.positions[0]["low"] == -1.5
    assert found.cost == {"steps": 79, "tokens": 160_780, "seconds": 300.0, "bytes": 1000}
    (root / stage.EVALUATE / "positions.csv").unlink()
    assert evidence(root, root / stage.EVALUATE).positions == []


def test_facts(root):
    tables = {title.en: english(rows) for title, rows in facts(root, RunRecord.read(root / stage.TRAIN))}
    assert tables["Data"]["source"] == PurePath("/far/away/rows.jsonl")
    assert tables["Data"]["held out"] == "3 documents, 1,500 tokens"
    assert tables["Data"]["split by"] == "text"
    assert tables["Model"] == {"base": PurePath("/far/away/base.pth"), "shape": "RWKV-7, 12 layers, width 768"}
    assert tables["Training"]["method"].startswith("lora, ")
    assert tables["Training"]["begun from"] == "the method's own values"
    assert tables["Training"]["time in training"] == "5 min"
    assert tables["Training"]["peak memory"] == "1.0 GB"
    (root / stage.MANIFEST).unlink()
    assert "Data" not in {title.en for title, _ in facts(root, RunRecord.read(root / stage.TRAIN))}


def test_a_state_that_is_trained_and_a_start_are_told(root):
    record = RunRecord.read(root / stage.TRAIN)
    adapter = record.params["adapter"] | {"state": "wkv", "load": "start/first.pth", "also": ["emb"]}
    train = record.params["train"] | {"carry_state": True, "epochs": None, "steps": 1200}
    record = changed(root, params=record.params | {"adapter": adapter, "train": train})
    rows = english(dict(facts(root, record))[TEXTS["settings"]])
    assert "emb, the initial state (wkv); layers: all" in rows["trained"]
    assert rows["begun from"] == PurePath("start/first.pth")
    assert rows["length"] == "1,200 steps"
    assert ", state carried, " in rows["rows are"]


def test_lineage_is_of_the_model_that_was_merged(root):
    rows = english(lineage(root, RunRecord.read(root / stage.TRAIN)))
    assert rows == {
        "base, sha256": "b" * 64, "data, sha256": "d" * 64, "adapter, sha256": f"{'a' * 64} (lora)",
        "tuned model, sha256": "e" * 64,
        "merge receipt, sha256": sha256(root / stage.MERGED / "receipt.json"), "DVC experiment": "wide", "run": "9ad9e949",
        "git commit": f"{'c' * 40}, with changes that are not committed", "machine": "my-laptop",
        "made with": "python 3.11, torch 2.13",
    }  # fmt: skip
    write(root / stage.STATE, "a state")
    bare = lineage(root, changed(root, git={"commit": None}, dvc_experiment={"name": None}))
    assert english(bare)["git commit"] == "none: not in a repository"
    assert english(bare)["mounted state, sha256"] == sha256(root / stage.STATE)
    assert "DVC experiment" not in english(bare)


@pytest.mark.parametrize(
    "judged", [{"sha256": "e" * 64}, {"sha256": "f" * 64}, {"sha256": "e" * 64, "state_sha256": "0" * 64}]
)
def test_a_card_says_nothing_of_what_another_model_was_judged(root, judged):
    write(root / stage.EVALUATE / "receipt.json", json.dumps({"tuned": judged}))
    text = card.text(root, {}, CARD)
    assert ("On 321 held-out documents" in text) == (judged == {"sha256": "e" * 64})
    assert ("It was not evaluated" in text) == (judged != {"sha256": "e" * 64})
    assert "far" not in text.replace("fast", "")
    assert "my-laptop" not in text


def test_a_card_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no record of a training; run the pipeline first"):
        card.text(tmp_path, {}, CARD)


def test_settings_in_words():
    settings = {"rank": 16, "alpha": 32.0, "dora": False, "rank_stabilized": True, "load": None, "of": {"a_b": "x"}}
    assert list(words(settings)) == ["rank 16", "alpha 32", "rank stabilized", "a b x"]
