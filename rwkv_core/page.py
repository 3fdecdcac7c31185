"""Pages that need no server and no network: a Jinja template, filled in, with a policy that lets nothing else in."""

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rwkv_core.escape import visible
from rwkv_core.files import whole_file

_POLICY = "@policy@"
"""Stands in a template where its policy goes."""


def write(path: Path, package: str, template: str, **values: Any) -> None:
    """Fill in a template of a package, and write the page to `path`.

    All text is escaped, and control characters in it are told by their number. The template's own style and script are the only
    ones that a browser runs: the page's Content-Security-Policy names their hashes, and forbids every request.
    """
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    source = files(package).joinpath(template).read_text(encoding="utf-8")
    page = environment.from_string(source).render(values)
    with whole_file(path) as temporary:
        temporary.write_text(page.replace(_POLICY, _policy(page), 1), encoding="utf-8")


def _policy(page: str) -> str:
    """What a browser may do with the page, https://www.w3.org/TR/CSP3/: apply its own styles and scripts, by their hashes."""
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts]
        rules.append(" ".join([directive, *(hashes or ["'none'"])]))
    return "; ".join(rules)
