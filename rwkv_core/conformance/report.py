"""The verdict on the files of an export: for programs, for MLflow's tag, and for a person.

conformance.json, under "conformance":

    passed     whether every file is what its clients need
    mode       full, or structure: no model was run
    conforms   one line: the formats that passed, each with who has read it; the tag of the registered model
    files      for each file: file, format, reader, passed, parameters, flushed_to_zero, and
               findings   what, found, rule, passed
               logits     reader, prompt, tokens, difference, allowed, same_top, decided, passed
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_core.conformance.check import Checked, Mode
from rwkv_core.errors import Problem
from rwkv_core.files import whole_file, write_json


def as_json(checked: Sequence[Checked], mode: Mode) -> dict[str, Any]:
    """What conformance.json has under "conformance"."""
    return {
        "passed": all(one.passed for one in checked),
        "mode": mode,
        "conforms": conforms(checked),
        "files": [
            {
                "file": one.file,
                "format": one.format,
                "reader": one.reader,
                "passed": one.passed,
                "parameters": one.total,
                "flushed_to_zero": one.flushed,
                "findings": [finding._asdict() for finding in one.findings],
                "logits": [_finite(row._asdict()) for row in one.logits],
            }
            for one in checked
        ],
    }


def conforms(checked: Sequence[Checked]) -> str:
    """In a line: pth (rwkv 0.8.32), st (reference). Files of one format that one reader has read are named once."""
    return ", ".join(dict.fromkeys(f"{one.format} ({one.reader})" for one in checked if one.passed)) or "none"


def markdown(checked: Sequence[Checked], mode: Mode) -> str:
    """The verdict for a person: a table of the files, what is wrong, and all that was looked at."""
    lines = [
        "# Conformance",
        "",
        "Each file was read by another program than the one that wrote it"
        + (", which computed logits on three prompts." if mode == "full" else "; no model was run."),
        "",
        "| | file | format | read by | furthest logit | allowed | same likeliest token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in checked:
        readers = list(dict.fromkeys(row.reader for row in one.logits)) or [one.reader]
        for reader in readers:
            rows = [row for row in one.logits if row.reader == reader]
            far = max((row.difference for row in rows), default=None)
            top = sum(row.same_top * row.tokens for row in rows) / max(sum(row.tokens for row in rows), 1)
            cells = [
                "yes" if one.passed else "**no**", one.file, one.format, reader,
                "" if far is None else f"{far:.2g}", f"{rows[0].allowed:.2g}" if rows else "", f"{top:.1%}" if rows else "",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    wrong = [(one.file, said) for one in checked for said in faults(one)]
    if wrong:
        lines += ["", "## What is wrong", "", *(f"- {_cell(file)}: {_cell(said)}" for file, said in wrong)]
    for one in checked:
        lines += ["", f"## {one.file}", "", "| | what | found | rule |", "| --- | --- | --- | --- |"]
        for finding in one.findings:
            cells = ["yes" if finding.passed else "**no**", finding.what, finding.found, finding.rule]
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
        for row in one.logits:
            found = f"{row.difference:.2g} from ours, the same likeliest token at {row.same_top:.1%} of {row.tokens} positions"
            rule = f"at most {row.allowed:.2g}; the same token at the {row.decided:.1%} that this decides"
            cells = ["yes" if row.passed else "**no**", f"{row.reader}: logits, {row.prompt}", found, rule]
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def faults(one: Checked) -> list[str]:
    """What is wrong with a file, a sentence each, the most telling first."""
    said = [f"{x.what}: {x.found} (must be: {x.rule})" for x in one.findings if not x.passed]
    return said + [
        f"{x.reader} is {x.difference:.3g} from our logits on the {x.prompt} prompt (at most {x.allowed:.3g})"
        for x in one.logits
        if not x.passed
    ]


def write(folder: Path, report: dict[str, Any], checked: Sequence[Checked], mode: Mode) -> None:
    """conformance.json and conformance.md, into a folder.

    Args:
        folder: where.
        report: what the export says of its files.
        checked: the verdicts.
        mode: how they were come to.
    """
    with whole_file(folder / "conformance.json") as temporary:
        write_json(temporary, report | {"conformance": as_json(checked, mode)})
    with whole_file(folder / "conformance.md") as temporary:
        temporary.write_text(markdown(checked, mode), encoding="utf-8")


def refuse(checked: Sequence[Checked], told: Path) -> None:
    """Say what is wrong with the first file that does not conform.

    Args:
        checked: the verdicts.
        told: where the whole verdict is.

    Raises:
        Problem: there is such a file.
    """
    wrong = [one for one in checked if not one.passed]
    if wrong:
        said = faults(wrong[0])
        more = sum(len(faults(one)) for one in wrong) - 1
        rule = "its clients would not read what we wrote" + (f", and {more} more findings" if more else "")
        raise Problem(f"{wrong[0].file}: {said[0]}", rule, f"see {told}, and report this as a defect")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}


def _cell(text: str) -> str:
    """Text in a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
