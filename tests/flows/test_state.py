"""`rwkvflow state` from the command line: from texts to a table of which is best."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from random_models import make

from flows import cli
from rwkv_core import checkpoint, state_lab
from rwkv_core.adapters import file
from rwkv_core.files import sha256
from rwkv_core.generation.chat import open_chat
from rwkv_core.generation.sampling import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("state") / "base.pth"
    checkpoint.write(path, make(vocab_size=256).state_dict())
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `rwkvflow state ...` in a folder of its own: what it says, or its problem, and its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["rwkvflow", "state", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return call


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return tmp_path_factory.mktemp("begun")


@pytest.fixture
def made(run, model, begun):
    """Two states of texts."""
    for name, text in (("short", "System: Be brief."), ("long", "System: Say all that can be said.")):
        if not (begun / f"{name}.pth").exists():
            code, said = run("from-text", model, begun / f"{name}.pth", "--text", text)
            assert code == 0, said
            assert f"{name}.rwkv-flow.pth: the same with its token shift" in said
            assert "Clients mount it without its token shift" in said
        for ending in ("", ".rwkv-flow"):
            shutil.copy(begun / f"{name}{ending}.pth", ".")
    return Path("short.pth"), Path("long.pth")


def test_from_a_text_to_a_chat(made, model):
    whole = file.read_record(Path("short.rwkv-flow.pth"))
    assert whole.base_sha256 == sha256(model)
    assert [x.name for x in whole.made_of] == ["System: Be brief."]
    greedy = Sampling(max_tokens=20, temperature=0.0, top_p=1.0, seed=0)
    told = open_chat(model, greedy, system="Be brief.")
    mounted = open_chat(model, greedy, state=Path("short.rwkv-flow.pth"))
    as_adapter = open_chat(model, greedy, adapter=Path("short.rwkv-flow.pth"))
    said = ["".join(chat.answer("Why?")) for chat in (told, mounted, as_adapter)]
    assert said[0] == said[1] == said[2]


def test_a_text_of_a_file_after_a_state(run, made, model):
    Path("talk.txt").write_text("User: Hi\n\nAssistant: Ho\n", encoding="utf-8")
    assert run("from-text", model, "more.pth", "--file", "talk.txt", "--begin", "short.rwkv-flow.pth")[0] == 0
    Path("all.txt").write_text("System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n", encoding="utf-8")
    assert run("from-text", model, "all.pth", "--file", "all.txt")[0] == 0
    more, at_once = (checkpoint.read(Path(f"{name}.rwkv-flow.pth")) for name in ("more", "all"))
    assert all(torch.allclose(x, at_once[name], rtol=1e-4, atol=1e-4) for name, x in more.items())
    assert [x.kind for x in file.read_record(Path("more.pth")).made_of] == ["state", "text"]


def test_mixing(run, made):
    assert run("average", *made, "mean.pth") == (0, "mean.pth: mean of 2, for clients to mount\n")
    assert run("average", *made, "weighted.pth", "--weights", "3 1")[0] == 0
    assert run("interpolate", *made, "quarter.pth", "--at", 0.25)[0] == 0
    code, said = run("interpolate", *made, "way.pth", "--steps", 3)
    assert (code, said.count("for clients")) == (0, 3)
    a, b = (checkpoint.read(path) for path in made)
    for name, share in {"mean": 0.5, "weighted": 0.25, "quarter": 0.25, "way-0": 0, "way-0.5": 0.5, "way-1": 1}.items():
        for key, x in checkpoint.read(Path(f"{name}.pth")).items():
            torch.testing.assert_close(x, (1 - share) * a[key] + share * b[key], msg=name)
    record = file.read_record(Path("weighted.pth"))
    assert [(x.name, x.weight) for x in record.made_of] == [("short.pth", 0.75), ("long.pth", 0.25)]
    assert record.base_sha256 == file.read_record(made[0]).base_sha256


def test_comparing(run, made, model):
    rows = [{"text": f"User: {i}?\n\nAssistant: {'yes ' * (i % 5 + 1)}"} for i in range(12)]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, said = run("leaderboard", model, "held.jsonl", *made, "--out", "t.csv", "--resamples", 200)
    assert code == 0, said
    table = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert set(table) == {"state", "---", "none", "short.pth", "long.pth"}
    lines = list(csv.DictReader(Path("t.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["state"] for line in lines] == table[2:]
    assert sorted(float(line["loss"]) for line in lines) == [float(line["loss"]) for line in lines]
    assert {line["state"]: line["from_none_value"] for line in lines}["none"] == "0"
    assert said.splitlines()[-1].startswith(f"{table[2]} is ")
    assert run("leaderboard", model, "held.jsonl", made[0], "--out", "t.md", "--resamples", 200)[0] == 0
    assert Path("t.md").read_text(encoding="utf-8").startswith("| state | loss |")


def test_checking(run, made, model):
    code, said = run("check", made[0], "--model", model)
    assert code == 0
    assert said.splitlines()[0].startswith("RWKV Runner        mounts it")
    checkpoint.write(Path("half.pth"), {"blocks.0.att.time_state": torch.zeros(4, 8, 8)})
    code, said = run("check", "half.pth", "--model", model)
    assert code == 1
    assert said.count("blocks.1.att.time_state is missing") == 4


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("average", "out.pth"), "what is to be averaged comes before"),
        (("average", "short.pth", "long.pth", "out.pth", "--weights", "1"), "--weights '1': there are 2 states"),
        (("average", "short.pth", "long.pth", "out.pth", "--weights", "1 x"), "must be numbers"),
        (("average", "short.pth", "long.pth", "out.pth", "--weights", "0 0"), "must be 0 or more, and one above 0"),
        (("average", "short.pth", "long.pth"), "long.pth: something is there already"),
        (("interpolate", "short.pth", "long.pth", "out.pth"), "--at and --steps: one of them says where"),
        (("check", "other.pth", "--model", "MODEL"), "other.pth belongs to the base ffffffffffff"),
        (("leaderboard", "MODEL", "x", "other.pth"), "other.pth belongs to the base ffffffffffff"),
        (("leaderboard", "MODEL", "x", "short.pth", "--out", "t.txt"), "must end in .md or .csv"),
        (("from-text", "MODEL", "out.pth"), "--text and --file: one of them has the text"),
        (("from-text", "MODEL", "out.pth", "--file", "none.txt"), "must be a text in UTF-8"),
        (("from-text", "MODEL", "out.pth", "--text", "x", "--begin", "other.pth"), "other.pth belongs to the base"),
    ],
    ids=str,
)
def test_a_problem_is_one_line(run, made, model, words, problem):
    state_lab.write(Path("other.pth"), state_lab.read(made[0]).tensors, "f" * 64, None, ())
    code, said = run(*(model if word == "MODEL" else word for word in words))
    assert code == 1
    assert problem in said
    assert said.startswith("rwkvflow: ")
    assert said.count("\n") == 1
