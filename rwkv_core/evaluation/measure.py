"""A number of each item, for two models that met the same items, and what changed between them."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core.errors import InputError

Array = npt.NDArray[np.float64]

FEWEST = 10
"""Items that a verdict needs: draws of fewer tell little of what others would give."""


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


def change(base: Items, tuned: Items, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Both means, and their difference with a paired bootstrap interval over items.

    Items are drawn with replacement, each with all its weight: tokens of one document are not independent. Each draw takes
    both models on the same items, so the items' own difficulty cancels.

    Args:
        base: of the base.
        tuned: of the tuned model, on the same items.
        resamples: draws.
        confidence: coverage of the interval.
        seed: of the draws.

    Returns:
        {"items", "base", "tuned", "change": {"value", "low", "high"}, "better", "higher_is_better"}. A change is tuned minus
        base. "better" is 1 or -1 if the interval lies on one side of 0, else 0; and 0 where there are fewer than FEWEST items.

    Raises:
        InputError: no item has a weight.

    Source:
        Percentile intervals: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; paired over test items,
        as in Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
    """
    measured = (base.weight > 0) & (tuned.weight > 0)
    count = int(measured.sum())
    if not count:
        raise InputError(f"{len(measured)} items", "none has anything to measure", "give others")
    base, tuned = (Items(x.total[measured], x.weight[measured], x.higher_is_better) for x in (base, tuned))
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(0, count, count)
        after, before = (x.total[chosen].sum() / x.weight[chosen].sum() for x in (tuned, base))
        draws[i] = after - before
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    side = int(low > 0) - int(high < 0)
    return {
        "items": count,
        "base": base.mean(),
        "tuned": tuned.mean(),
        "change": {"value": tuned.mean() - base.mean(), "low": float(low), "high": float(high)},
        "better": (side if base.higher_is_better else -side) if count >= FEWEST else 0,
        "higher_is_better": base.higher_is_better,
    }
