"""Whether an answer has the form that clients expect: it ends by itself, and speaks for nobody else."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rwkv_core.data.dialogue import WIDE_COLON

_ROLE = re.compile(r"^\s*(User|Assistant|System)\s*[:：]", re.MULTILINE)


def ends(text: str, ending: str) -> bool:
    """It ended with token 0 or with the beginning of the next turn, not because it had become too long."""
    return ending in ("end", "stop")


def one_turn(text: str, ending: str) -> bool:
    """No line of it begins another turn."""
    return _ROLE.search(text) is None


def plain_colons(text: str, ending: str) -> bool:
    """No line of it begins with a role and a full-width colon, as a model that learned "User：" from Chinese rows writes it."""
    return WIDE_COLON.search(text) is None


FORM: Mapping[str, Callable[[str, str], bool]] = MappingProxyType(
    {"ends": ends, "one_turn": one_turn, "plain_colons": plain_colons}
)
"""What is looked at, by name: of an answer's text, and its ending as of `generation.text.Continuation`."""
