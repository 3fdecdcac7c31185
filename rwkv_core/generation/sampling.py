"""One token from the model's logits: penalties on what was said, then the likeliest tokens, then the temperature.

Shapes: V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_core.errors import InputError, WorldError


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens, and when to stop.

    Raises:
        InputError: a value is outside its range.
    """

    max_tokens: int
    """Longest continuation, at least 1."""
    temperature: float
    """Probabilities are taken to the power of 1 / temperature. 0: always the likeliest token."""
    top_p: float
    """In (0, 1]. Draw only from the likeliest tokens that together have this probability."""
    seed: int
    """At least 0. Each row of a batch draws from numbers of its own, which depend on the seed and on the row's number alone."""
    top_k: int = 0
    """Draw only from so many of the likeliest tokens, also. 0: no such limit."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token drawn before."""
    frequency_penalty: float = 0.0
    """Taken from it as many times as the token was drawn."""
    penalty_decay: float = 1.0
    """In [0, 1]. With each token drawn, the counts of the earlier ones are multiplied by it."""
    stop: tuple[str, ...] = ()
    """Texts at which a continuation ends; they are not part of it."""
    logprobs: int | None = None
    """Tell with each token how likely it was, and so many of the likeliest. None: tell nothing."""

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "must be 1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "must be 0 or more"),
            "top_p": (0 < self.top_p <= 1, "must be above 0, and 1 at most"),
            "seed": (self.seed >= 0, "must be 0 or more"),
            "top_k": (self.top_k >= 0, "must be 0 or more"),
            "penalty_decay": (0 <= self.penalty_decay <= 1, "must be from 0 to 1"),
            "stop": (all(self.stop), "must not have an empty text"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "must be 0 or more"),
        }
        for name, (right, rule) in ranges.items():
            if not right:
                raise InputError(f"{name} = {getattr(self, name)!r}", rule, "correct it")


class Likely(NamedTuple):
    """A token, and the logarithm of its probability: the model's own, before penalties, limits and temperature."""

    token: int
    logprob: float


def likely(logits: Tensor, token: int, count: int) -> tuple[Likely, tuple[Likely, ...]]:
    """How likely a token is, and the `count` likeliest, in their order, given the model's logits (V,)."""
    logprobs = torch.log_softmax(logits.float(), -1)
    best = logprobs.topk(min(count, len(logprobs)))
    found = (Likely(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Likely(token, float(logprobs[token])), tuple(found)


class Draws:
    """The draws of one text: its random numbers, and how often each token was drawn.

    The counts cover the text that is drawn, not its prompt.

    Source:
        BlinkDL/ChatRWKV, API_DEMO_CHAT.py, and josStorer/RWKV-Runner, backend-python/utils/rwkv.py: of each token drawn before,
        logit -= presence + count * frequency; after a draw, all counts are decayed first, then its own is one more. A token
        once drawn keeps its presence penalty, however far its count has decayed.
    """

    def __init__(self, sampling: Sampling, row: int) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng((sampling.seed, row))
        self._count: dict[int, float] = {}

    def next(self, logits: Tensor) -> int:
        """The next token, given the model's logits (V,) after the last one.

        Raises:
            WorldError: the largest logit is no finite number.
        """
        s, logits = self._sampling, logits.float()
        if self._count and (s.presence_penalty or s.frequency_penalty):
            penalty = [-(s.presence_penalty + n * s.frequency_penalty) for n in self._count.values()]
            tokens = torch.tensor(list(self._count), device=logits.device)
            logits = logits.index_add(0, tokens, torch.tensor(penalty, device=logits.device))
        token = draw(logits, s.temperature, s.top_p, s.top_k, self._random.random())
        self._count = {other: n * s.penalty_decay for other, n in self._count.items()}
        self._count[token] = self._count.get(token, 0.0) + 1
        return token


def draw(logits: Tensor, temperature: float, top_p: float, top_k: int, uniform: float) -> int:
    """One token.

    Both limits are on the probabilities at temperature 1, as in ChatRWKV; a token must be within both.

    Args:
        logits: (V,), float32.
        temperature: 0 takes the likeliest token.
        top_p: the fewest of the likeliest tokens whose probabilities reach it are left.
        top_k: so many of the likeliest are left; 0 leaves all.
        uniform: a random number in [0, 1): equal ones draw equal tokens.

    Raises:
        WorldError: the largest logit is no finite number.
    """
    best = logits.argmax()
    if not torch.isfinite(logits[best]):  # argmax takes a NaN for the largest
        raise WorldError(
            f"the model's largest logit is {float(logits[best])}", "must be finite", "compute in bf16 or fp32, not fp16"
        )
    if temperature == 0:
        return int(best)
    p = torch.softmax(logits, -1)
    # all tokens below this have less than 1 - top_p together: leaving them out spares most of the sorting
    candidates = (p >= 0.5 * (1 - top_p) / len(p)).nonzero()[:, 0]
    p, order = p[candidates].sort(descending=True, stable=True)
    kept = int((p.double().cumsum(-1) < top_p).sum()) + 1  # the first token to reach top_p is kept too
    p = p[: min(kept, top_k or kept)].double()
    # relative to the largest, which is 1 at any temperature: the others may vanish at a low one
    reached = ((p / p[0]) ** (1 / temperature)).cumsum(-1)
    return int(candidates[order[(reached <= uniform * reached[-1]).sum()]])
