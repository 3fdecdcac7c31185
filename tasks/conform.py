"""Whether the files of an export conform: what the export stage and the gate ask, and what both are told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_core import checkpoint, models
from rwkv_core.conformance.check import Checked, Expected, Mode, Subject, check
from rwkv_core.formats import tuned_state
from rwkv_core.tokenizer import named

REFUSED = Path(".rwkvflow/refused")
"""Where the verdict on an export that did not conform is left: its files are not."""


def exported(
    model: Path,
    state: Path | None,
    folder: Path,
    report: Mapping[str, Any],
    data: Mapping[str, Any],
    divisor: float | None,
    mode: Mode,
) -> list[Checked]:
    """Check the files of an export.

    Args:
        model: what was exported.
        state: the tuned state that was exported beside it, if there is one.
        folder: where the files are.
        report: what `rwkv_core.export.export` said of them.
        data: the settings `data` of the training: tokenizer, special_tokens.
        divisor: the model's head_size_divisor, or None.
        mode: whether to compute logits.
    """
    subjects = []
    for entry in report["formats"].values():
        subjects.append(Subject(folder / entry["file"]))
        if "state" in entry:
            subjects.append(Subject(folder / entry["state"]["file"], folder / entry["file"]))
    expected = Expected(
        checkpoint.read(model),
        tuned_state.for_clients(checkpoint.read(state)) if state is not None else None,
        head_size_divisor=models.divisor(model, divisor),
        tokenizer=named(data["tokenizer"], data["special_tokens"]),
    )
    return check(subjects, expected, mode)
