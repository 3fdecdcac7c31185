"""What came of an evaluation, in words: whether the model is better, at what cost, what is not known, what to do next."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rwkv_core import escape
from rwkv_core.evaluation.measure import FEWEST
from rwkv_core.texts import TEXTS, Text, joined

T = TEXTS

GROUPS = ("sources", "general", "answers", "format", "memorised", "tasks", "lm_eval")
"""What can be measured beside the held-out documents, in the order of the report."""

HELD_OUT = ("loss", "perplexity", "bits_per_byte")

_SHARES = ("answers", "format", "memorised")
"""Groups whose measures are shares of 1."""
_NO_SHARE = re.compile(r"loss|perplexity|ppl|bits|byte_|nats")


class Measure(NamedTuple):
    """One row of the report."""

    group: str
    key: str
    """Its name in metrics.json."""
    name: Text
    items: int
    base: float
    tuned: float
    value: float
    """Tuned minus base."""
    low: float
    high: float
    better: int
    higher_is_better: bool
    few: bool
    """Too few items for a verdict."""
    share: bool
    """Of 1; shown in per cent."""

    def shown(self, value: float, *, change: bool = False) -> str:
        """A value as it is written."""
        sign = "+" if change else ""
        if self.share:
            return f"{100 * value:{sign}.1f} pp" if change else f"{value:.1%}"
        return f"{value:{sign}.1f}" if max(abs(self.base), abs(self.tuned)) >= 100 else f"{value:{sign}.4f}"

    @property
    def verdict(self) -> str:
        """Name of the text that says it."""
        return "too_few" if self.few else {1: "better", -1: "worse", 0: "same"}[self.better]


class Verdict(NamedTuple):
    """The summary."""

    headline: Text
    tone: str
    """better, worse, mixed, or same."""
    sentence: Text
    """The held-out documents in a sentence."""
    points: list[tuple[str, Text]]
    """Each with its tone."""
    unmeasured: list[Text]
    advice: list[Text]


def name(group: str, raw: str) -> Text:
    """What a measure is called: as we say, if it is one of ours; else as the source or the task is called."""
    known = T.get(f"{group}.{raw}") or (T[raw] if raw in HELD_OUT else None)
    return known or Text.same(escape.name(raw))


def measures(comparison: Mapping[str, Any]) -> list[Measure]:
    """All that metrics.json compares, the held-out documents first."""
    few = comparison["documents"] < FEWEST
    found = []
    for raw in HELD_OUT:
        change = comparison["change"][raw]
        better = 0 if few else int(change["high"] < 0) - int(change["low"] > 0)
        found.append(
            Measure(
                "held_out", raw, name("held_out", raw), comparison["documents"], comparison["base"][raw],
                comparison["tuned"][raw], change["value"], change["low"], change["high"], better,
                higher_is_better=False, few=few, share=False,
            )
        )  # fmt: skip
    for group in GROUPS:
        entries = comparison.get("measures", {}).get(group, {})
        for raw, entry in (
            entries.items() if group != "sources" or len(entries) > 1 else ()
        ):  # one source is all there is
            change = entry["change"]
            base, tuned = entry["base"], entry["tuned"]
            share = group in _SHARES or (
                group in ("tasks", "lm_eval")
                and not _NO_SHARE.search(raw)
                and 0 <= min(base, tuned) <= max(base, tuned) <= 1
            )
            found.append(
                Measure(
                    group, raw, name(group, raw), entry["items"], base, tuned, change["value"], change["low"], change["high"],
                    entry["better"], entry["higher_is_better"], entry["items"] < FEWEST, share,
                )
            )  # fmt: skip
    return found


def judge(
    comparison: Mapping[str, Any], valid: list[tuple[float, float]], cost: Mapping[str, Any] | None = None
) -> Verdict:
    """Put it in words.

    Args:
        comparison: metrics.json.
        valid: held-out loss during training, by step.
        cost: {"steps", "tokens", "seconds", "bytes"} of the training; None: not known.
    """
    rows = measures(comparison)
    few, better = comparison["documents"] < FEWEST, comparison["better"]
    lost = [m for m in rows if m.group == "general" and m.better < 0]
    worse = [m for m in rows if m.group not in ("held_out", "general") and m.better < 0]
    best = min(valid, key=lambda point: point[1], default=None)
    overfitted = best is not None and best[0] < valid[-1][0] and valid[-1][1] - best[1] > 0.01 * abs(best[1])
    points = list(_points(comparison, rows, cost))
    if overfitted and best is not None:
        words = {
            "step": f"{best[0]:g}",
            "last": f"{valid[-1][0]:g}",
            "lowest": f"{best[1]:.4f}",
            "end": f"{valid[-1][1]:.4f}",
        }
        points.append(("worse", T["overfitted"](**words)))
    unmeasured = [T[group] for group in GROUPS if not comparison.get("measures", {}).get(group)]
    gains = any(m.better > 0 for m in rows if m.group != "held_out")
    headline, tone = _headline(few, better, gains, bool(lost or worse))
    sentences = [T[{"better": "do_use", "worse": "do_not_use", "mixed": "do_weigh", "same": "do_more"}[tone]]]
    if overfitted and best is not None:
        sentences.append(T["do_stop"](step=f"{best[0]:g}"))
    if any(m.group == "memorised" and m.better < 0 for m in rows):
        sentences.append(T["do_recite"])
    if unmeasured:
        sentences.append(T["do_measure"])
    return Verdict(headline, tone, sentence(comparison), points, unmeasured, sentences)


def _headline(few: bool, better: int, gains: bool, losses: bool) -> tuple[Text, str]:
    """The result in a few words, and its tone.

    Args:
        few: there are too few held-out documents.
        better: what is said of their loss: 1, 0 or -1.
        gains: another measure is better.
        losses: another measure is worse.
    """
    if few:
        return T["few"], "same"
    if better > 0:
        return (T["is_mixed"], "mixed") if losses else (T["is_better"], "better")
    if better < 0:
        return T["is_worse"], "worse"
    if losses:
        return T["is_worse_but"], "mixed" if gains else "worse"
    return (T["is_better_but"], "better") if gains else (T["is_same"], "same")


def sentence(comparison: Mapping[str, Any]) -> Text:
    """The held-out documents in a sentence."""
    change = comparison["change"]["loss"]
    return T["held_out_is" if comparison["documents"] >= FEWEST else "held_out_few"](
        documents=f"{comparison['documents']:,}",
        tokens=f"{comparison['tokens']:,}",
        word=T[{1: "better_than", -1: "worse_than", 0: "same_as"}[comparison["better"]]],
        base=f"{comparison['base']['loss']:.4f}",
        tuned=f"{comparison['tuned']['loss']:.4f}",
        change=f"{change['value']:+.4f}",
        low=f"{change['low']:+.4f}",
        high=f"{change['high']:+.4f}",
        confidence=f"{comparison['confidence']:.0%}",
    )


def _points(
    comparison: Mapping[str, Any], rows: list[Measure], cost: Mapping[str, Any] | None
) -> Iterator[tuple[str, Text]]:
    base, tuned = (comparison[which]["perplexity"] for which in ("base", "tuned"))
    if max(base, tuned) < 1e6 and comparison["better"]:
        yield "plain", T["perplexity_is"](base=f"{base:,.1f}", tuned=f"{tuned:,.1f}")
    if comparison["documents"] < FEWEST:
        yield "worse", T["few_documents"](documents=comparison["documents"], fewest=FEWEST)
    if comparison.get("documents_not_scored"):
        yield "plain", T["not_scored"](count=f"{comparison['documents_not_scored']:,}")
    yield from _forgetting([m for m in rows if m.group == "general"])
    for group in GROUPS:
        if group != "general":
            yield from _group(group, [m for m in rows if m.group == group])
    compared = [m for m in rows if m.group != "held_out" and not m.few]
    if len(compared) >= 5:
        expected = len(compared) * (1 - comparison["confidence"])
        yield (
            "plain",
            T["chance"](count=len(compared), expected=f"{expected:.1f}" if expected < 10 else f"{expected:.0f}"),
        )
    if cost is not None:
        yield (
            "plain",
            T["cost"](
                steps=f"{cost['steps']:,}",
                tokens=f"{cost['tokens']:,}",
                time=time(cost["seconds"]),
                size=size(cost["bytes"]),
            ),
        )


def _forgetting(rows: list[Measure]) -> Iterator[tuple[str, Text]]:
    """General text: the one thing that training on other text is likely to cost."""
    lost, ends = [m for m in rows if m.better < 0], ("change", "low", "high")
    if lost:
        parts = [
            T["loss_rises"](
                name=m.name,
                **{end: m.shown(x, change=True) for end, x in zip(ends, (m.value, m.low, m.high), strict=True)},
            )
            for m in lost
        ]
        yield "worse", T["forgotten"](names=joined(parts))
    for m in rows:
        if m.few:
            yield "plain", T["forgetting_open"](name=m.name)
        elif m.better >= 0:
            key = "not_forgotten" if m.high > 0 else "not_forgotten_below"
            yield "better", T[key](name=m.name, high=m.shown(m.high))


def _group(group: str, rows: list[Measure]) -> Iterator[tuple[str, Text]]:
    """A sentence on its measures; the worst that it says gives the tone."""
    parts, tones = [], []
    for tone, key, found in (
        ("better", "better_on", [m for m in rows if m.better > 0]),
        ("worse", "worse_on", [m for m in rows if m.better < 0]),
        ("plain", "same_on", [m for m in rows if not m.better and not m.few]),
        ("plain", "few_on", [m for m in rows if m.few]),
    ):
        if found:
            names = joined(m.name if tone == "plain" else _with_numbers(m) for m in found)
            parts.append(T[key](names=names, fewest=FEWEST))
            tones.append(tone)
    if parts:
        tone = next(tone for tone in ("worse", "better", "plain") if tone in tones)
        yield tone, T["group_is"](group=T[group], parts=joined(parts, ("; ", "；")))


def _with_numbers(m: Measure) -> Text:
    return T["from_to"](name=m.name, base=m.shown(m.base), tuned=m.shown(m.tuned))


def time(seconds: float) -> Text:
    """A duration."""
    if seconds < 120:
        return T["seconds"](count=f"{seconds:.0f}")
    return T["minutes"](count=f"{seconds / 60:.0f}") if seconds < 7200 else T["hours"](count=f"{seconds / 3600:.1f}")


def size(count: float) -> str:
    """Bytes, in the unit that they are said in."""
    power = min(int(math.log(max(count, 1), 1000)), 3)
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB')[power]}"
