"""`rwkvflow promote`, `rollback`, `lineage` and `card`, light to import."""

import json
from collections.abc import Callable
from pathlib import Path

from flows import run

Say = Callable[[str], None]


def promote(root: Path, version: str, say: Say) -> int:
    """Judge a version and make it the champion if it passes: shown in Prefect where a server answers.

    Args:
        root: the checkout, and the current folder.
        version: number, alias or hash.
        say: is told how far it is, and the verdict.

    Returns:
        0 promoted, 1 not.
    """
    if run.reach(root):
        from flows.promote import promote as flow  # imports Prefect, which reads the environment set above

        state = flow(version, return_state=True)
        say(state.message or "")
        return 0 if state.name == "Promoted" else 1
    from tasks import params
    from tasks.promote import promote as promote_version

    outcome = promote_version(root, version, params.load(), say)
    say(outcome.report)
    return 0 if outcome.promoted else 1


def rollback(root: Path, say: Say) -> None:
    """Let the champion be what it was before."""
    from tasks import params
    from tasks.promote import rollback as roll_back

    run.reach(root)
    was, now = roll_back(root, params.load(), say)
    say(f"{was} was the champion; now version {now.number} ({now.key}) is, as before it: {now.model}")


def card(root: Path, model: str | None, out: Path | None, say: Say) -> None:
    """Write a model's card, or say it.

    Args:
        root: the checkout.
        model: number, alias or hash of a version; None: of what lies in the checkout's outputs.
        out: the file; None: it is said.
        say: is given the card.
    """
    from rwkv_core.files import whole_file
    from tasks import card as cards
    from tasks import mirror, params, stage
    from tasks.record import main_root
    from tasks.registry import Registry

    folder = root if model is None else Registry(main_root(root)).find(model).folder
    conformance = mirror.read_json(folder / stage.EXPORT / "conformance.json")
    merged = mirror.read_json(folder / stage.MERGED / "receipt.json").get("merged", {}).get("sha256")
    if conformance.get("merged", {}).get("sha256") != merged:
        conformance = {}  # of another model
    text = cards.text(folder, conformance, params.load().export.card)
    if out is None:
        say(text)
        return
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lineage(root: Path, model: str, say: Say, *, rows: bool, as_json: bool) -> None:
    """Say what a model was made from, back to the rows.

    Args:
        root: the checkout.
        model: a path; or number, alias or hash of a version.
        say: is given the lines.
        rows: the documents themselves, as JSON, a line each.
        as_json: one object, for programs.
    """
    from tasks import lineage as walk

    found = walk.trace(root, model)
    if rows:
        for row in walk.rows(found):
            say(json.dumps(row, ensure_ascii=False))
    elif as_json:
        say(json.dumps(found.steps, indent=2, ensure_ascii=False))
    else:
        for line in walk.lines(found):
            say(line)
