"""Pages that need no server and no network: a Jinja template, filled in."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from rwkv_core.files import whole_file


def write(path: Path, package: str, template: str, **values: Any) -> None:
    """Fill in a template of a package, where all text is escaped, and write the page to `path`."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = files(package).joinpath(template).read_text(encoding="utf-8")
    page = environment.from_string(source).render(values)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
