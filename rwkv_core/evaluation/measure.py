"""A number of each item, for two models that met the same items, and what changed between them."""

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core.errors import InputError

Array = npt.NDArray[np.float64]

FEWEST = 10
"""Items that a verdict needs: draws of fewer tell little of what others would give."""

_AT_ONCE = 1 << 20
"""Items of all draws that are in memory together: 16 MB."""

_NORMAL_FROM = 10_000
"""Degrees of freedom from which Student's t is the normal distribution."""


class Items(NamedTuple):
    """What a model got of each item. (I,) each."""

    total: Array
    """Sum of what is measured over the item: nats of its tokens, or 1 where its answer is right."""
    weight: Array
    """How much of it there is: its tokens, or 1; 0 where the item has nothing to measure."""
    higher_is_better: bool

    def mean(self) -> float:
        """Of a unit of weight; NaN where there is none."""
        weight = self.weight.sum()
        return float(self.total.sum() / weight) if weight else math.nan

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Items":
        """Those of some items, (I,)."""
        return Items(self.total[chosen], self.weight[chosen], self.higher_is_better)


Measures = Mapping[str, Mapping[str, Items]]
"""All that is measured of a model: by group (sources, general, answers, ...), and in it by name."""


def change(
    base: Items,
    tuned: Items,
    *,
    resamples: int,
    confidence: float,
    seed: int,
    form: Callable[[Array], Array] = lambda mean: mean,
) -> dict[str, Any]:
    """Both means, and their difference with a paired bootstrap interval over items.

    Items are drawn with replacement, each with all its weight: tokens of one document are not independent. Each draw takes
    both models on the same items, so the items' own difficulty cancels.

    The interval's ends are percentiles of the draws, further out than the confidence alone says: few items, of unequal weight,
    make draws that vary less than other items would. How far, Student's t says for the degrees of freedom that the items'
    variance is known with: 2 n / (k - 1), of the kurtosis k of what each item does to the difference (jackknife), and no more
    than the items that would tell as much if their weights were equal, less one.

    Args:
        base: of the base.
        tuned: of the tuned model, on the same items.
        resamples: draws.
        confidence: coverage of the interval.
        seed: of the draws.
        form: what is made of a mean before two are compared, for any number of them: np.exp makes a loss a perplexity.

    Returns:
        {"items", "base", "tuned", "change": {"value", "low", "high"}, "better", "higher_is_better"}. A change is tuned minus
        base. "better" is 1 or -1 if the interval lies on one side of 0, else 0; and 0 where there are fewer than FEWEST items.

    Raises:
        InputError: no item has a weight.

    Source:
        Percentile intervals: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; expanded: Hesterberg
        2015, "What Teachers Should Know About the Bootstrap", arXiv:1411.5279; degrees of freedom: Satterthwaite 1946, "An
        Approximate Distribution of Estimates of Variance Components"; items of equal weight: Kish 1965, "Survey Sampling".
        Paired over test items, as in Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
    """
    measured = (base.weight > 0) & (tuned.weight > 0)
    count = int(measured.sum())
    if not count:
        raise InputError(f"{len(measured)} items", "none has anything to measure", "give others")
    base, tuned = base.of(measured), tuned.of(measured)
    columns = np.stack([tuned.total, tuned.weight, base.total, base.weight], 1)

    def difference(sums: Array) -> Array:
        return form(sums[:, 0] / sums[:, 1]) - form(sums[:, 2] / sums[:, 3])

    whole = columns.sum(0)
    low = high = value = float(difference(whole[None])[0])
    if count > 1:
        without_each = difference(whole - columns)
        z = _reach(without_each.mean() - without_each, base.weight + tuned.weight, confidence)
        tail = NormalDist().cdf(-z)
        low, high = map(float, np.quantile(difference(_drawn(columns, resamples, seed)), [tail, 1 - tail]))
    side = int(low > 0) - int(high < 0)
    before, after = (float(form(np.array([one.mean()]))[0]) for one in (base, tuned))
    return {
        "items": count,
        "base": before,
        "tuned": after,
        "change": {"value": value, "low": low, "high": high},
        "better": (side if base.higher_is_better else -side) if count >= FEWEST else 0,
        "higher_is_better": base.higher_is_better,
    }


def changes(
    base: Measures, tuned: Measures, *, resamples: int, confidence: float, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """What changed in each measure that both models have, as `change` says it; those without any weight are left out."""
    found = {
        group: {
            name: change(items, tuned[group][name], resamples=resamples, confidence=confidence, seed=seed)
            for name, items in measures.items()
            if name in tuned.get(group, {}) and ((items.weight > 0) & (tuned[group][name].weight > 0)).any()
        }
        for group, measures in base.items()
    }
    return {group: measures for group, measures in found.items() if measures}


def _drawn(columns: Array, resamples: int, seed: int) -> Array:
    """Sums of the columns (I, K) over the items of each draw, (R, K)."""
    items, rng, sums = len(columns), np.random.default_rng(seed), []
    for at in range(0, resamples, step := max(_AT_ONCE // items, 1)):
        draws = min(step, resamples - at)
        chosen = rng.integers(0, items, (draws, items)) + items * np.arange(draws)[:, None]
        times = np.bincount(chosen.ravel(), minlength=draws * items).reshape(draws, items)
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _reach(influences: Array, weights: Array, confidence: float) -> float:
    """Standard errors from the middle to the ends of an interval.

    Args:
        influences: (I,), what each item does to the difference, in any unit.
        weights: (I,).
        confidence: coverage of the interval.
    """
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    variance = float((influences**2).mean())
    kurtosis = float((influences**4).mean()) / variance**2 if variance**2 > 0 else 1.0
    known = 2 * len(influences) / (kurtosis - 1) if kurtosis > 1 else math.inf
    freedom = max(min(known, effective - 1), 1.0)
    return _students_t(confidence, freedom) * math.sqrt(max(effective, 2.0) / (max(effective, 2.0) - 1))


def _students_t(confidence: float, freedom: float) -> float:
    """What the magnitude of a Student's t stays below with this probability.

    With t = sqrt(freedom) tan(a), the angle a has a density proportional to cos(a) ** (freedom - 1).
    """
    if freedom > _NORMAL_FROM:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    angles = np.linspace(0, math.pi / 2, 1 << 14)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, share / share[-1], angles)))
