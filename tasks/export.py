"""export: the merged model in the formats that clients read, each file read back, and computed with by its client."""

from pathlib import Path

from rwkv_core.conformance import report as verdict
from rwkv_core.conformance.exports import exported
from rwkv_core.export import export as export_files
from rwkv_core.files import whole_folder
from rwkv_core.tokenizer import named
from tasks import card, mirror, stage, tracking
from tasks.params import load

REFUSED = Path(".rwkvflow/refused")
"""Where the verdict on an export that did not conform is left; its files are not."""


def export() -> None:
    """outputs/merged -> outputs/export: model.pth, model.st, model-f16.gguf, hf/, conformance.json, README.md; a state's too.

    Raises:
        Problem: a file is not what its clients need. The stage leaves none then, but the verdict in `REFUSED`.
    """
    params = load()
    with whole_folder(stage.EXPORT) as out:
        report = export_files(
            stage.MODEL, out, params.export, state=stage.mounted(), tokenizer=params.data.tokenizer,
            special=params.data.special_tokens, head_size_divisor=params.model.head_size_divisor,
        )  # fmt: skip
        tokenizer, mode = named(params.data.tokenizer, params.data.special_tokens), params.export.conformance
        checked = exported(
            out, report, stage.MODEL, mode, state=stage.mounted(), tokenizer=tokenizer,
            head_size_divisor=params.model.head_size_divisor,
        )  # fmt: skip
        if not all(one.passed for one in checked):
            verdict.write(REFUSED, report, checked, mode)
            verdict.refuse(checked, REFUSED / "conformance.md")
        verdict.write(out, report, checked, mode)
        found = mirror.read_json(out / "conformance.json")
        (out / card.NAME).write_text(card.text(Path(), found, params.export.card), encoding="utf-8")
    tracking.publish(Path.cwd(), params.tracking)
    entries = [
        *report["formats"].values(),
        *(entry["state"] for entry in report["formats"].values() if "state" in entry),
    ]
    print(f"exported {', '.join(str(stage.EXPORT / entry['file']) for entry in entries)}")
    print(f"conforms: {verdict.conforms(checked)}; see {stage.EXPORT / 'conformance.md'}")


if __name__ == "__main__":
    stage.main(export)
