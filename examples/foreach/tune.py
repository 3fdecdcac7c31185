"""python tune.py NAME: train with one of adapters.yaml, in the folder NAME beside this file, a folder of the checkout."""

import os
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main(name: str) -> None:
    """Give the train stage a folder with params.yaml and outputs/data, as it has in the checkout, and run it there."""
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    change(params, yaml.load((HERE / "adapters.yaml").read_text(encoding="utf-8"))["adapters"][name])
    folder = HERE / name
    params["model"]["base"] = os.path.relpath(ROOT / params["model"]["base"], folder)
    (folder / "outputs").mkdir(parents=True, exist_ok=True)
    data = folder / "outputs/data"
    if not data.is_symlink():
        data.symlink_to(os.path.relpath(ROOT / "outputs/data", data.parent), target_is_directory=True)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)

    sys.path.insert(0, str(ROOT))
    from tasks import stage, tracking
    from tasks.train import train

    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking.uri(ROOT))  # beside the checkout's own runs
    os.chdir(folder)
    stage.main(train)


def change(values: dict[str, Any], by: dict[str, Any]) -> None:
    """Put the values of `by` in place; an adapter of another kind takes the place of all."""
    for key, value in by.items():
        other_kind = isinstance(value, dict) and "kind" in value and value["kind"] != values[key].get("kind")
        if isinstance(value, dict) and not other_kind:
            change(values[key], value)
        else:
            values[key] = value


if __name__ == "__main__":
    main(sys.argv[1])
