"""export: the merged model in the formats that clients read, each file read back and checked."""

from pathlib import Path

from rwkv_core.export import export as export_files
from rwkv_core.files import whole_folder, write_json
from tasks import stage, tracking
from tasks.params import load


def export() -> None:
    """outputs/merged -> outputs/export: model.pth, model.st, model-f16.gguf, hf/, conformance.json; of a state, its files."""
    params = load()
    with whole_folder(stage.EXPORT) as out:
        report = export_files(
            stage.MODEL, out, params.export, state=stage.mounted(), tokenizer=params.data.tokenizer,
            special=params.data.special_tokens, head_size_divisor=params.model.head_size_divisor,
        )  # fmt: skip
        write_json(out / "conformance.json", report)
    tracking.publish(Path.cwd(), params.tracking)
    entries = [
        *report["formats"].values(),
        *(entry["state"] for entry in report["formats"].values() if "state" in entry),
    ]
    print(f"exported {', '.join(str(stage.EXPORT / entry['file']) for entry in entries)}")


if __name__ == "__main__":
    stage.main(export)
