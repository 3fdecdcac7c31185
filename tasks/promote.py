"""Promotion: a version of the registry is judged against its base and the champion, and takes its place if all checks pass."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core import gate
from rwkv_core.adapters import file as adapter_file
from rwkv_core.config import EvaluateConfig
from rwkv_core.conformance import report as conformance
from rwkv_core.conformance.exports import exported
from rwkv_core.data import near
from rwkv_core.data.binidx import Documents
from rwkv_core.data.dialogue import TURN
from rwkv_core.data.whole import whole
from rwkv_core.errors import InputError, Problem
from rwkv_core.evaluation import held_out as evaluation
from rwkv_core.evaluation.judge import Judged, Texts
from rwkv_core.evaluation.judge import judge as judge_model
from rwkv_core.evaluation.measure import changes
from rwkv_core.evaluation.subject import Said, Subject
from rwkv_core.evaluation.suite import Suite
from rwkv_core.export import export
from rwkv_core.files import sha256, whole_file, write_json
from rwkv_core.gate import Check
from rwkv_core.generation.sampling import Sampling
from rwkv_core.tokenizer import named
from tasks import mirror, registry, stage, tracking
from tasks.judging import precision, sources, store
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
        checks, notes, measures = judge(root, version, champion, known.versions(), params, say)
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
            "measures": measures,
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
) -> tuple[list[Check], list[str], dict[str, Any]]:
    """Every check of a version, what else a person should know, and all that was measured against base and champion.

    The held-out rows are those of the version's own run. What either model was trained on is left out of them: rows that are
    equal to one of its training rows to the token, or as like it as the version's own preparation lets no training row be.
    """
    if champion is not None and champion.key == version.key:
        same = Check("another model than the champion", "it is the champion", "another file", False)
        return [same], [], {}
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
        return [files], [], {}
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
) -> tuple[list[Check], list[str], dict[str, Any]]:
    params.check_retention()
    settings, rules = _at(root, params.evaluate), params.promote
    data = version.record.params["data"]
    tokenizer = named(data["tokenizer"], data["special_tokens"])
    held_out = Documents(version.folder / stage.DATA / "valid")
    parts = sources(mirror.read_json(version.folder / stage.MANIFEST))
    seen, notes = _seen(held_out, version, champion, versions, data["holdout"]["near_duplicates"])
    prompts: Sequence[str] = ()
    if rules.answers is not None:
        prompts = evaluation.held_out_prompts(held_out, tokenizer, rules.answers.count)
    skip_first = any(one is not None and one.state for one in (version, champion))
    suite = Suite(
        settings, tokenizer, held_out, Documents(version.folder / stage.DATA / "train"),
        marks=[part["marks"][0] for part in data["parts"] if part["marks"] is not None], seed=params.seed,
        skip_first=skip_first, left_out=np.flatnonzero(seen).tolist(), say=say,
    )  # fmt: skip
    base, known_scores = _base(root, version), store(root)
    judged: dict[str, Judged] = {}
    given: list[Said] = []
    with tempfile.TemporaryDirectory(prefix="rwkvflow-") as folder:
        general = None
        if settings.general is not None:
            general, _ = whole(settings.general, tokenizer, Path(folder) / "general")
        of = {"base": (base, version, None), "candidate": (version.model, version, stage.mounted(version.folder))}
        if champion is not None:
            of["champion"] = (champion.model, champion, stage.mounted(champion.folder))
        for name, (path, made, state) in of.items():  # one in memory at a time
            also = f", {len(general)} of general text" if general is not None else ""
            say(f"scoring the {name}: {len(held_out)} held-out documents{also}")
            subject = Subject(
                path, tokenizer, state=state, dtype=precision(params), op=params.model.op,
                head_size_divisor=made.record.base["head_size_divisor"], store=known_scores,
            )  # fmt: skip
            one = judge_model(
                subject, Texts(held_out, parts, general), ctx_len=settings.ctx_len, batch=settings.batch,
                skip_first=skip_first, further=suite.ask,
            )  # fmt: skip
            if name == "candidate" and prompts and np.isfinite(one.held_out.nats).all():
                given = _answers(subject, prompts, params)
            judged[name] = one
    finite = gate.finite(
        [one for one in (judged["candidate"].held_out, judged["candidate"].general) if one is not None]
    )
    judged = {name: one._replace(held_out=one.held_out.without(seen)) for name, one in judged.items()}
    mine = judged.pop("candidate")
    checks = [
        gate.lower(name, one.held_out, mine.held_out, rules.held_out, settings, params.seed)
        for name, one in judged.items()
    ]
    if rules.retention is None:
        measured = "is measured, and nothing is asked of it" if settings.general else "was not measured"
        notes.append(f"Forgetting {measured}: promote.retention is null.")
    else:
        for name, one in judged.items():
            if one.general is not None and mine.general is not None:
                margin = rules.retention.margin
                checks.append(gate.kept(name, one.general, mine.general, margin, settings, params.seed))
    checks.append(finite)
    if given and rules.answers is not None:
        checks += gate.answers(given, rules.answers.ended)
    elif rules.answers is not None:
        notes.append("Answers were not looked at: no held-out row has a dialogue.")
    measures = {
        name: changes(
            one.measures(parts), mine.measures(parts), resamples=settings.resamples, confidence=settings.confidence,
            seed=params.seed,
        )
        for name, one in judged.items()
    }  # fmt: skip
    say("exporting it, and letting clients read the files")
    return [*checks, files, _exports(version, params)], notes, measures


def _at(root: Path, settings: EvaluateConfig) -> EvaluateConfig:
    """The settings with the files that they name, wherever this process is."""
    asked = settings.lm_eval
    if asked is not None and asked.include is not None:
        asked = asked.model_copy(update={"include": root / asked.include})
    return settings.model_copy(
        update={
            "general": settings.general and root / settings.general,
            "tasks": {name: root / path for name, path in settings.tasks.items()},
            "lm_eval": asked,
        }
    )


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


def _answers(subject: Subject, prompts: Sequence[str], params: Params) -> list[Said]:
    """What it says to the prompts, and why each answer ended."""
    settings, rules = params.evaluate, params.promote.answers
    if rules is None:
        return []
    drawn = Sampling(
        max_tokens=rules.max_tokens,
        temperature=settings.samples.temperature,
        top_p=settings.samples.top_p,
        seed=params.seed,
        stop=(TURN,),
    )
    return subject.texts(prompts, drawn, ctx_len=settings.ctx_len, batch=settings.batch)


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
