"""The benchmark of a GPU, rehearsed on the CPU in tiny sizes: a GPU's minutes are too dear to find its faults with."""

import json

from benchmarks import gpu


def test_rehearsal(tmp_path):
    table = gpu.measure("cpu", gpu.SMALL, tmp_path)
    told = json.loads(table.with_suffix(".json").read_text())
    assert {row["operator"] for row in told["WKV"]} == {"wkv4", "wkv6", "wkv7"}
    assert {"cpu", "torch"} <= {row["implementation"] for row in told["WKV"]}
    assert all(row["both_ms"] > 0 and row["error"] < 0.02 for row in told["WKV"])
    assert len(told["Around it"]) == 10
    assert [row["model"] for row in told["LoRA step"]] == ["tiny"]
    text = table.read_text()
    assert all(f"## {title}" in text for title in ("WKV", "Around it", "LoRA step"))
