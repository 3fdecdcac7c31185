"""What lies in examples/ runs as its own first lines say."""

import json
import re

import pytest
from project import make

pytestmark = pytest.mark.slow


def test_foreach_trains_each_adapter_and_a_changed_one_alone(tmp_path):
    project = make(tmp_path / "project")
    text = (project.root / "examples/foreach/dvc.yaml").read_text()
    copy, repro, metrics, plots = re.search(r"#   (cp .*)", text)[1].split(" && ")
    project.run(*copy.split())
    project.dvc(*repro.split()[1:])
    found = json.loads(project.dvc(*metrics.split()[1:], "--json").stdout.splitlines()[-1])[""]["data"]
    losses = {name: found[f"arms/{name}/outputs/train/metrics.json"]["data"]["valid_loss"] for name in ("lora", "bone")}
    assert losses["lora"] != losses["bone"]
    kinds = {name: project.json(f"arms/{name}/outputs/train/run.json")["params"]["adapter"]["kind"] for name in losses}
    assert kinds == {"lora": "lora", "bone": "bone"}
    assert (project.root / "mlflow.db").exists()
    assert not list((project.root / "arms").rglob("mlflow.db"))
    project.dvc(*plots.split()[1:])
    assert "Held-out loss of each adapter" in (project.root / "dvc_plots/index.html").read_text()
    adapters = project.root / "arms/adapters.yaml"
    adapters.write_text(adapters.read_text().replace("rank: 32", "rank: 16"))
    status = json.loads(project.dvc("status", "--json", "arms/dvc.yaml").stdout)
    assert {name for name in status if "tune" in name} == {"arms/dvc.yaml:tune@bone"}
