"""All files of an export at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_core import checkpoint, models
from rwkv_core.conformance.check import Checked, Expected, Mode, Subject, check
from rwkv_core.formats import tuned_state
from rwkv_core.tokenizer import Tokenizer


def exported(
    folder: Path,
    report: Mapping[str, Any],
    model: Path,
    mode: Mode,
    *,
    state: Path | None,
    tokenizer: Tokenizer,
    head_size_divisor: float | None,
) -> list[Checked]:
    """Check the files of an export against what was exported.

    Args:
        folder: where the files are.
        report: what `rwkv_core.export.export` said of them.
        model: what was exported.
        mode: whether to compute logits.
        state: the tuned state that was exported beside it, if there is one.
        tokenizer: the model's.
        head_size_divisor: as of `models.load`.
    """
    subjects = []
    for entry in report["formats"].values():
        subjects.append(Subject(folder / entry["file"]))
        if "state" in entry:
            subjects.append(Subject(folder / entry["state"]["file"], folder / entry["file"]))
    expected = Expected(
        checkpoint.read(model),
        tuned_state.for_clients(checkpoint.read(state)) if state is not None else None,
        head_size_divisor=models.divisor(model, head_size_divisor),
        tokenizer=tokenizer,
    )
    return check(subjects, expected, mode)
