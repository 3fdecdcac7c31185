"""Whether an answer has the form that clients expect: it ends by itself, and speaks for nobody else."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rwkv_core.data.dialogue import WIDE_COLON
from rwkv_core.evaluation.subject import Said

_ROLE = re.compile(r"^\s*(User|Assistant|System)\s*[:：]", re.MULTILINE)


def ends(answer: Said) -> bool:
    """It ended with token 0 or with the beginning of the next turn, not because it had become too long."""
    return answer.ending in ("end", "stop")


def one_turn(answer: Said) -> bool:
    """No line of it begins another turn."""
    return _ROLE.search(answer.text) is None


def plain_colons(answer: Said) -> bool:
    """No line of it begins with a role and a full-width colon, as a model that learned "User：" from Chinese rows writes it."""
    return WIDE_COLON.search(answer.text) is None


FORM: Mapping[str, Callable[[Said], bool]] = MappingProxyType(
    {"ends": ends, "one_turn": one_turn, "plain_colons": plain_colons}
)
"""What is looked at, by name."""
