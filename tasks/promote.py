"""Promotion: a version of the registry is judged against its base and the champion, and takes its place if all checks pass."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core import checkpoint, gate, models
from rwkv_core.adapters import file as adapter_file
from rwkv_core.conformance import report as conformance
from rwkv_core.conformance.exports import exported
from rwkv_core.data import near
from rwkv_core.data.binidx import Documents
from rwkv_core.data.prepare import whole
from rwkv_core.errors import InputError, Problem
from rwkv_core.evaluation import held_out as evaluation
from rwkv_core.evaluation.held_out import Scores
from rwkv_core.export import export
from rwkv_core.files import sha256, whole_file, write_json
from rwkv_core.gate import Check
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Continuation, generate
from rwkv_core.models.state import mount
from rwkv_core.tokenizer import Tokenizer, named
from tasks import mirror, registry, stage, tracking
from tasks.params import Params
from tasks.record import main_root
from tasks.registry import Registry, Version

Say = Callable[[str], None]


class Outcome(NamedTuple):
    """What became of a promotion."""

    version: Version
    promoted: bool
    report: str
    """In markdown."""


class _Judged(NamedTuple):
    """What a model makes of the texts."""

    held_out: Scores
    general: Scores | None
    answers: list[Continuation]


def promote(root: Path, name: str, params: Params, say: Say, flow_run: str | None = None) -> Outcome:
    """Judge a version by the settings of `promote`, and make it the champion if it passes. One at a time.

    Args:
        root: the checkout.
        name: number, alias or hash of the version.
        params: the checkout's.
        say: is told how far it is.
        flow_run: Prefect's id, if a flow does it.

    Raises:
        InputError: there is no such version, or what it must be judged by is gone.
        WorldError: the champion's files are gone.
    """
    known = Registry(main_root(root))
    with known.one_at_a_time(say):
        version, champion = known.find(name), known.champion()
        checks, notes = judge(root, version, champion, known.versions(), params, say)
        passed = all(check.passed for check in checks)
        verdict = {
            "passed": passed,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version.key,
            "number": version.number,
            "champion": champion.key if champion else None,
            "champion_number": champion.number if champion else None,
            "checks": [check._asdict() for check in checks],
            "notes": notes,
            "settings": params.promote.model_dump(mode="json"),
            "flow_run": flow_run,
        }
        with whole_file(version.folder / registry.VERDICT) as temporary:
            write_json(temporary, verdict)
        report = markdown(verdict)
        with whole_file(version.folder / "verdict.md") as temporary:
            temporary.write_text(report, encoding="utf-8")
        if passed:
            known.promote(version, flow_run)
    tracking.publish(root, params.tracking)
    return Outcome(version, passed, report)


def rollback(root: Path, params: Params, say: Say) -> tuple[str, Version]:
    """Make the champion what it was before the last promotion that is not undone yet; see `Registry.rollback`."""
    known = Registry(main_root(root))
    with known.one_at_a_time(say):
        done = known.rollback()
    tracking.publish(root, params.tracking)
    return done


def judge(
    root: Path, version: Version, champion: Version | None, versions: Sequence[Version], params: Params, say: Say
) -> tuple[list[Check], list[str]]:
    """Every check of a version, and what else a person should know.

    The held-out rows are those of the version's own run. What either model was trained on is left out of them: rows that are
    equal to one of its training rows to the token, or as like it as the version's own preparation lets no training row be.
    """
    if champion is not None and champion.key == version.key:
        same = Check("another model than the champion", "it is the champion", "another file", False)
        return [same], []
    for one in (version, champion) if champion else (version,):
        if not one.has_rows:
            raise InputError(
                f"version {one.number} ({one.key})",
                "the rows it was trained on are not kept, so what it may be judged on is not known: others lay in outputs/data "
                "when it was merged",
                "train and merge it again" if one is version else "go back to a champion before: rwkvflow rollback",
            )
    damaged = champion.damage() if champion else None
    if damaged:
        raise InputError(
            f"champion {champion and champion.key}", damaged, "bring the file back, or `rwkvflow rollback`"
        )
    damaged = version.damage()
    files = Check(
        "files are those registered", damaged or f"sha256 {version.merged[:16]}", "the same bytes", not damaged
    )
    if damaged:
        return [files], []
    manifest = mirror.read_json(version.folder / stage.MANIFEST)
    if champion is not None:
        theirs = mirror.read_json(champion.folder / stage.MANIFEST)
        if manifest["vocabulary"]["sha256"] != theirs["vocabulary"]["sha256"]:
            raise InputError(
                f"version {version.number} and champion {champion.number}",
                "have different tokenizers, so that nats a token are not the same thing",
                "prepare the data with the champion's data.tokenizer and data.special_tokens",
            )
    return _judge(root, version, champion, versions, params, files, say)


def _judge(
    root: Path,
    version: Version,
    champion: Version | None,
    versions: Sequence[Version],
    params: Params,
    files: Check,
    say: Say,
) -> tuple[list[Check], list[str]]:
    settings, rules = params.evaluate, params.promote
    data = version.record.params["data"]
    tokenizer = named(data["tokenizer"], data["special_tokens"])
    held_out = Documents(version.folder / stage.DATA / "valid")
    seen, notes = _seen(held_out, version, champion, versions, data["holdout"]["near_duplicates"])
    prompts: Sequence[str] = ()
    if rules.answers is not None:
        prompts = evaluation.held_out_prompts(held_out, tokenizer, rules.answers.count)
    skip_first = any(one is not None and one.state for one in (version, champion))
    base = _base(root, version)
    judged: dict[str, _Judged] = {}
    with tempfile.TemporaryDirectory(prefix="rwkvflow-") as folder:
        general = whole(rules.retention.text, tokenizer, Path(folder) / "general") if rules.retention else None
        of = {"base": (base, version, None), "candidate": (version.model, version, stage.mounted(version.folder))}
        if champion is not None:
            of["champion"] = (champion.model, champion, stage.mounted(champion.folder))
        for name, (path, made, state) in of.items():  # one in memory at a time
            also = f", {len(general)} of general text" if general is not None else ""
            say(f"scoring the {name}: {len(held_out)} held-out documents{also}")
            asked = prompts if name == "candidate" else ()
            divisor = made.record.base["head_size_divisor"]
            judged[name] = _scored(path, state, divisor, held_out, general, tokenizer, skip_first, asked, params)
    others = {name: one for name, one in judged.items() if name != "candidate"}
    mine = judged["candidate"]
    checks = [
        gate.lower(
            name, _without(one.held_out, seen), _without(mine.held_out, seen), rules.held_out, settings, params.seed
        )
        for name, one in others.items()
    ]
    if rules.retention is not None:
        for name, one in others.items():
            if one.general is not None and mine.general is not None:
                margin = rules.retention.margin
                checks.append(gate.kept(name, one.general, mine.general, margin, settings, params.seed))
    else:
        notes.append("Forgetting was not measured: promote.retention is null.")
    checks.append(gate.finite([mine.held_out, *([mine.general] if mine.general is not None else [])]))
    if mine.answers and rules.answers is not None:
        checks += gate.answers(mine.answers, rules.answers.ended)
    elif rules.answers is not None:
        notes.append("Answers were not looked at: no held-out row has a dialogue.")
    say("exporting it, and letting clients read the files")
    return [*checks, files, _exports(version, params)], notes


def _seen(
    held_out: Documents,
    version: Version,
    champion: Version | None,
    versions: Sequence[Version],
    least: float | None,
) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Which held-out documents either model was trained on, and what there is to say about it."""
    seen, notes = np.zeros(len(held_out), bool), []
    for name, one in {"candidate": version, "champion": champion}.items():
        if one is None:
            continue
        found = np.zeros(len(held_out), bool)
        rows, unknown = _trained_on(one, versions)
        for folder in rows:
            found |= near.seen(held_out, Documents(folder / stage.DATA / "train"), least)
        if found.any():
            notes.append(
                f"{int(found.sum())} of {len(found)} held-out documents are left out: the {name} was trained on them, or on "
                "nearly the same."
            )
        if unknown:
            notes.append(
                f"The {name} began from adapter {unknown[:16]}, which is not registered: its rows are not known."
            )
        seen |= found
    notes.append("What the base was trained on is not known.")
    return seen, notes


def _trained_on(version: Version, versions: Sequence[Version]) -> tuple[list[Path], str | None]:
    """Folders of the version and of those whose adapters it began from; and the adapter of which there is none, if any."""
    adapters = {one.files.get(stage.ADAPTER.as_posix()): one for one in versions}
    folders: list[Path] = []
    while True:
        folders.append(version.folder)
        about = adapter_file.read_record(version.folder / stage.ADAPTER)
        if about is None or about.loaded is None:
            return folders, None
        before = adapters.get(about.loaded)
        if before is None or not before.has_rows or before.folder in folders:
            return folders, about.loaded
        version = before


def _base(root: Path, version: Version) -> Path:
    """The base that a version was trained on, by its bytes."""
    base = version.record.base
    path = root / str(base["path"])
    if not path.exists() or sha256(path) != base["sha256"]:
        state = "is another file now" if path.exists() else "is not there"
        raise InputError(
            str(path),
            f"{state}: version {version.number} was trained on sha256 {base['sha256'][:16]}",
            "bring that one back",
        )
    return path


def _scored(
    path: Path,
    state: Path | None,
    divisor: float,
    held_out: Documents,
    general: Documents | None,
    tokenizer: Tokenizer,
    skip_first: bool,
    prompts: Sequence[str],
    params: Params,
) -> _Judged:
    import torch

    settings, device = params.evaluate, "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if params.train.precision == "bf16" else torch.float32
    model = models.load(path, dtype=dtype, device=device, op=params.model.op, head_size_divisor=divisor).eval()
    tuned = checkpoint.read(state) if state is not None else None
    held, text = (
        None
        if documents is None
        else evaluation.score(
            model,
            documents,
            tokenizer,
            ctx_len=settings.ctx_len,
            batch=settings.batch,
            state=tuned,
            skip_first=skip_first,
        )
        for documents in (held_out, general)
    )
    if held is None:
        raise ValueError("there are held-out documents")
    answers: list[Continuation] = []
    if prompts and params.promote.answers is not None and np.isfinite(held.nats).all():
        drawn = Sampling(
            max_tokens=params.promote.answers.max_tokens,
            temperature=settings.samples.temperature,
            top_p=settings.samples.top_p,
            seed=params.seed,
            stop=(gate.TURN,),
        )
        begin = None if tuned is None else mount(model.initial_state(1), tuned)
        states = [begin] * len(prompts)
        answers = generate(
            model, tokenizer, prompts, drawn, ctx_len=settings.ctx_len, batch=settings.batch, states=states
        )
    return _Judged(held, text, answers)


def _without(scores: Scores, seen: npt.NDArray[np.bool_]) -> Scores:
    """The scores, of which those documents count for nothing."""
    return Scores(*(np.where(seen, 0.0, column) for column in scores))


def _exports(version: Version, params: Params) -> Check:
    """Export the registered files anew: each conforms, and with the same settings they are those of the stage."""
    what, rule = (
        "exports conform",
        "each is read and computed with by its client, and has the bytes that the stage exported",
    )
    stored = mirror.read_json(version.folder / stage.EXPORT / "conformance.json").get("formats", {})
    folder = version.folder / "exports"
    shutil.rmtree(folder, ignore_errors=True)  # of a promotion that was killed
    try:
        folder.mkdir()
        state = stage.mounted(version.folder)
        divisor = version.record.base["head_size_divisor"]
        data = params.data
        report = export(
            version.model, folder, params.export, state=state, tokenizer=data.tokenizer, special=data.special_tokens,
            head_size_divisor=divisor,
        )  # fmt: skip
        checked = exported(
            folder, report, version.model, params.export.conformance, state=state,
            tokenizer=named(data.tokenizer, data.special_tokens), head_size_divisor=divisor,
        )  # fmt: skip
    except Problem as problem:
        return Check(what, str(problem), rule, False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [f"{one.file}: {said}" for one in checked for said in conformance.faults(one)]
    if wrong:
        return Check(what, "; ".join(wrong[:3]), rule, False)
    made = report["formats"]
    same_settings = version.record.params.get("export") == params.export.model_dump(mode="json")
    other = [form for form in made if form in stored and stored[form]["sha256"] != made[form]["sha256"]]
    same = "the same bytes as exported" if stored else "exported here for the first time"
    if other and same_settings:
        return Check(what, f"{', '.join(other)}: other bytes than the stage exported", rule, False)
    return Check(what, f"{conformance.conforms(checked)}: {same}", rule, True)


def markdown(verdict: Mapping[str, Any]) -> str:
    """A verdict for a person to read."""
    against = (
        f"champion {verdict['champion_number']} (`{verdict['champion']}`)" if verdict["champion"] else "no champion"
    )
    passed = verdict["passed"]
    lines = [
        f"# Version {verdict['number']}: {'promoted' if passed else 'not promoted'}",
        "",
        f"`{verdict['version']}`, judged {verdict['time']} against its base and {against}.",
        "",
        "| | check | measured | rule |",
        "| --- | --- | --- | --- |",
    ]
    for check in verdict["checks"]:
        cells = ["yes" if check["passed"] else "**no**", check["what"], check["found"], check["rule"]]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    lines += ["", *(f"- {note}" for note in verdict["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    """Text of a model, perhaps, in a table."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("<", "&lt;").replace("`", "'").replace("[", "\\[")
