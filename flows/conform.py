"""`rwkvflow conform`: is a file what its clients need?"""

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rwkv_core import checkpoint, models
from rwkv_core.conformance.check import Checked, Expected, Mode, Subject, check
from rwkv_core.conformance.report import as_json, conforms, faults, markdown
from rwkv_core.errors import InputError
from rwkv_core.formats import tuned_state
from rwkv_core.tokenizer import world


def conform(
    file: Path,
    *,
    against: Path | None,
    state: Path | None,
    lora: tuple[Path, float] | None,
    head_size_divisor: float | None,
    mode: Mode,
    form: str,
    say: Callable[[str], None],
) -> bool:
    """Check a file, say what was found, and tell whether all of it is as it must be.

    Args:
        file: a model, in any of the formats.
        against: the model that it was made from; None: what we read from the file itself.
        state: a tuned state's file, to be mounted on it.
        lora: a LoRA for web-rwkv to be blended into it, and the alpha of its recipe. `against` is the merged model then.
        head_size_divisor: the model's, as of `models.load`.
        mode: whether to compute logits.
        form: how to say it: text, markdown or json.
        say: prints.

    Raises:
        InputError: a file is not there, or there is nothing to compare with.
    """
    for path in (file, against, state, lora[0] if lora else None):
        if path is not None and not path.exists():
            raise InputError(str(path), "nothing is there", "correct the path")
    model = checkpoint.read(against) if against is not None else None
    if lora is not None and model is None:
        raise InputError(
            f"--lora {lora[0]}", "what the base becomes with it is not known", "say --against the merged model"
        )
    of_clients = tuned_state.for_clients(checkpoint.read(state)) if state is not None else None
    subjects = [Subject(file)] if lora is None else [Subject(lora[0], file, lora[1])]
    if state is not None:
        subjects.append(Subject(state, file))
    divisor = models.divisor(against or file, head_size_divisor)
    special = checkpoint.special_tokens(file)
    expected = Expected(
        model, of_clients, merged=model, head_size_divisor=divisor,
        tokenizer=world().with_special(special) if special else None,
    )  # fmt: skip
    checked = check(subjects, expected, mode)
    if form == "json":
        say(json.dumps(as_json(checked, mode), indent=2, ensure_ascii=False))
    elif form == "markdown":
        say(markdown(checked, mode))
    else:
        _show(checked, say)
    return all(one.passed for one in checked)


def _show(checked: list[Checked], say: Callable[[str], None]) -> None:
    """A table of what was looked at, and what is wrong."""
    console = Console(highlight=False)
    for one in checked:
        table = Table(title=f"{one.file}: {one.format}, read by {one.reader}", title_justify="left")
        for column in ("", "what", "found"):
            table.add_column(column, overflow="fold")
        for finding in one.findings:
            table.add_row("yes" if finding.passed else "no", finding.what, finding.found)
        for row in one.logits:
            told = (
                f"{row.difference:.2g} apart, {row.allowed:.2g} allowed; the same likeliest token at {row.same_top:.1%}"
            )
            table.add_row("yes" if row.passed else "no", f"{row.reader}: logits, {row.prompt}", told)
        console.print(table)
        for said in faults(one):
            say(f"{one.file}: {said}")
    say(f"conforms: {conforms(checked)}")
