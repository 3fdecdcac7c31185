"""merge: base and adapter become one checkpoint that every RWKV client reads."""

from pathlib import Path

from rwkv_core.files import whole_folder, write_json
from rwkv_core.merge import Part
from rwkv_core.merge import merge as merge_files
from tasks import stage, tracking
from tasks.params import load


def merge() -> None:
    """Base and outputs/train/adapter.pth -> outputs/merged: model.pth, receipt.json, and the state that was tuned, if any."""
    params = load()
    with whole_folder(stage.MERGED) as out:
        paths = out / stage.MODEL.name, out / stage.STATE.name
        receipt = merge_files(params.model.base, [Part(stage.ADAPTER)], paths[0], state=paths[1])
        write_json(out / "receipt.json", receipt)
    tracking.publish(Path.cwd(), params.tracking)
    print(f"merged {receipt['merged']['matrices_changed']} matrices into {stage.MODEL}")
    if receipt["states"]:
        print(f"mount beside it: {', '.join(str(stage.MERGED / name) for name in receipt['states'])}")


if __name__ == "__main__":
    stage.main(merge)
