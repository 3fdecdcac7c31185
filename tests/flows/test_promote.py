"""Promotion through a real Prefect server, and from the command line without one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from registered import ROOT, Checkout, dialogues

from rwkv_core import checkpoint
from rwkv_core.models.rwkv7 import RWKV7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Two versions: the base as it is, and one that has learned something."""
    root = tmp_path_factory.mktemp("checkout")
    made = Checkout(root)
    model = RWKV7(RWKV7.new_shape(2, 32, 8, 256))
    model.initialize(torch.Generator().manual_seed(0))
    checkpoint.write(made.base, model.state_dict())
    (root / "params.yaml").write_text(made.params.model_dump_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        made.prepare(dialogues(60, 1, shuffled=0))
        made.train(made.base, 1, 0, lr=1e-9)
        made.register()
        made.tuned(2, rows=60)
        yield made


@pytest.fixture(autouse=True)
def _as_made(checkout, monkeypatch):
    monkeypatch.chdir(checkout.root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    yield
    (checkout.registry.folder / "champions.json").unlink(missing_ok=True)


def test_the_flow_s_state_and_artifact_say_what_became_of_it(prefect_server, checkout):
    from prefect.artifacts import Artifact

    from flows.promote import KEY, promote

    state = promote("1", return_state=True)
    assert (state.type, state.name) == ("COMPLETED", "Refused")
    assert "# Version 1: not promoted" in Artifact.get(KEY).data
    state = promote(return_state=True)
    assert (state.type, state.name, state.message) == ("COMPLETED", "Promoted", "version 2 is the champion now")
    report = Artifact.get(KEY).data
    assert "# Version 2: promoted" in report
    assert "| yes | held-out loss against the base |" in report
    assert checkout.registry.champion().number == 2
    (change,) = checkout.registry.changes()
    assert change.flow_run == str(state.state_details.flow_run_id)
    state = promote("7", return_state=True)
    assert state.is_failed()
    assert "7: no file and no registered version has this name" in state.message


def test_the_form_has_a_help_text_for_the_version(prefect_server):
    from prefect.utilities.callables import parameter_schema

    from flows.promote import promote

    (version,) = parameter_schema(promote.fn).properties.values()
    assert "candidate, the newest" in version["description"]
    assert version["default"] == "candidate"


def rwkvflow(checkout, *words):
    nobody = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words], cwd=checkout.root, env=os.environ | nobody,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_line_needs_no_server(settings, checkout):
    refused, promoted, twice = (rwkvflow(checkout, "promote", *which) for which in (["1"], [], ["2"]))
    assert [done.returncode for done in (refused, promoted, twice)] == [1, 0, 1]
    assert "# Version 1: not promoted" in refused.stdout
    assert "# Version 2: promoted" in promoted.stdout
    assert "it is the champion" in twice.stdout
    back = rwkvflow(checkout, "rollback")
    assert back.returncode == 1
    assert "is the first champion: there is none before it to go back to" in back.stderr
    checkout.registry.promote(checkout.registry.find("1"), None)
    back = rwkvflow(checkout, "rollback")
    assert back.returncode == 0, back.stderr
    assert "now version 2 (" in back.stdout
    said = rwkvflow(checkout, "lineage", "champion").stdout
    assert "  aliases: champion, candidate\n" in said
    rows = [json.loads(line) for line in rwkvflow(checkout, "lineage", "champion", "--rows").stdout.splitlines()]
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in dialogues(60, 2, shuffled=0))
    card = rwkvflow(checkout, "card", "champion").stdout
    assert card.startswith("---\n")
    assert "fine-tuned from base.pth on corpus.jsonl" in card
    assert checkout.registry.find("2").merged in card
    assert str(checkout.root) not in card
    assert rwkvflow(checkout, "card", "2", "--out", "README.md").stdout == ""
    assert (checkout.root / "README.md").read_text() == card
    assert "7: no file and no registered version has this name" in rwkvflow(checkout, "card", "7").stderr
    steps = json.loads(rwkvflow(checkout, "lineage", "2", "--json").stdout)
    assert steps["adapters"][0]["training"]["params"]["evaluate"]["resamples"] == 500
