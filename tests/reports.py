"""Evaluations to write reports of: a full one, and text that wants to be more than text."""

from typing import Any

import numpy as np

from rwkv_core.report import Evidence
from rwkv_core.texts import TEXTS, Text

EVILS = (
    "<script>window.ran = 1</script>",
    "</style><script>window.ran = 1</script>",
    '" onload="window.ran = 1" x="',
    "<img src=http://127.0.0.1:9/x.png onerror='window.ran = 1'>",
    "[here](javascript:alert(1)) ![x](http://127.0.0.1:9/y.png)",
    "a | b ` c ``` d </pre> </td></table> <!-- e",
    "abc\u202edef\u2066ghi שלום مرحبا\x00\x1b[31m",
    "{{ 7 * 7 }} {% raw %} {name} @policy@",
)
"""Each is shown as it is, or with its control characters told, and does nothing."""
EVIL = "\n\n# x\n\n".join(EVILS)


def measure(items: int, base: float, tuned: float, width: float, *, higher_is_better: bool = False) -> dict[str, Any]:
    """As of `evaluation.measure.change`, with an interval of twice `width`."""
    change = tuned - base
    low, high = change - width, change + width
    side = (low > 0) - (high < 0)
    return {
        "items": items, "base": base, "tuned": tuned, "change": {"value": change, "low": low, "high": high},
        "better": (side if higher_is_better else -side) if items >= 10 else 0, "higher_is_better": higher_is_better,
    }  # fmt: skip


CHANGE = {
    "loss": {"value": -0.5, "low": -0.6251, "high": -0.4},
    "perplexity": {"value": -3.5, "low": -4.0, "high": -3.0},
    "bits_per_byte": {"value": -0.25, "low": -0.3, "high": -0.2},
}
COMPARISON = {
    "base": {"loss": 2.125, "perplexity": 8.3729, "bits_per_byte": 1.0625},
    "tuned": {"loss": 1.625, "perplexity": 5.0784, "bits_per_byte": 0.8125},
    "change": CHANGE, "better": 1, "documents": 321, "documents_not_scored": 0, "tokens": 98765, "confidence": 0.95,
}  # fmt: skip
MEASURES = {
    "sources": {
        "support.jsonl": measure(140, 3.1, 2.2, 0.1), "文档/手册.jsonl": measure(80, 2.9, 2.7, 0.12),
        "poems.jsonl": measure(66, 3.4, 3.45, 0.2), "tiny.jsonl": measure(8, 3.0, 2.0, 0.5),
    },
    "general": {"wiki.txt": measure(300, 2.81, 2.95, 0.05)},
    "answers": {
        "exact_match": measure(120, 0.31, 0.58, 0.09, higher_is_better=True),
        "f1": measure(120, 0.42, 0.66, 0.08, higher_is_better=True),
        "choice_acc": measure(120, 0.4, 0.44, 0.1, higher_is_better=True),
    },
    "format": {
        "ends": measure(64, 0.4, 0.97, 0.1, higher_is_better=True),
        "one_turn": measure(64, 0.8, 0.97, 0.1, higher_is_better=True),
    },
    "memorised": {"verbatim": measure(200, 0.01, 0.055, 0.03)},
    "tasks": {
        "lambada/acc": measure(500, 0.41, 0.405, 0.03, higher_is_better=True),
        "lambada/log_perplexity": measure(500, 12.1, 12.9, 0.5),
    },
    "lm_eval": {"piqa/acc": measure(1838, 0.66, 0.655, 0.012, higher_is_better=True)},
}  # fmt: skip
FULL = COMPARISON | {"measures": MEASURES}


def positions(count: int = 9) -> list[dict[str, float]]:
    return [
        {
            "from": 1 + (16 << i >> 1 if i else 0), "to": 16 << i,
            "tokens": 9000 >> i, "base_loss": 6 - i / 3, "tuned_loss": 5.5 - i / 3,
            "change": -0.5, "low": -0.6 - i / 30, "high": -0.4 + i / 30,
        }
        for i in range(count)
    ]  # fmt: skip


def evidence(comparison: dict[str, Any] = FULL, text: str = "hello", **changes: Any) -> Evidence:
    """Of one sample, with `text` wherever words of others are."""
    base = np.random.default_rng(0).normal(3, 1, 50)
    train = [(step, 4 / step) for step in range(1, 60)]
    rows: list[tuple[Text, object]] = [(TEXTS["source"], text), (TEXTS["rows"], 77)]
    sample = {"prompt": text, "base": f"你好 the same words here {text}", "tuned": "the same words here, and others"}
    made = Evidence(
        comparison=comparison, train=train, valid=[(1, 4.0), (30, 0.3), (50, 0.1)], positions=positions(),
        documents=(base, base - 0.1), samples=[sample], facts=[(TEXTS["data"], rows)],
        lineage=[(TEXTS["base_hash"], "fd5242145586192c" * 4), (TEXTS["run"], text)],
        cost={"steps": 79, "tokens": 160_780, "seconds": 38.2, "bytes": 604_911},
    )  # fmt: skip
    return made._replace(**changes)


def evil() -> Evidence:
    """With `EVIL` in every place where words of others can be."""
    named = {group: {EVIL: next(iter(of.values()))} for group, of in MEASURES.items()}
    return evidence(COMPARISON | {"measures": named}, EVIL)
