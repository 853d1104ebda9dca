"""Writes the pages that people read: one file each, with its styles, its script and its pictures inside.

A content security policy forbids the browser to fetch anything, and to run any script but the one that the page was written with, by its
hash. The script sorts and filters the tables and shows what a mark stands for; without it, all figures are on the page too.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from ..exporter.errors import IntegrityError
from .wording import FILTERS

_MAX_PNG = 64 * 2**20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def render_page(template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        template: A file of `templates/`.
        values: What the template shows. All of it is escaped.
    """
    environment = _environment()
    script = environment.get_template("tables.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return str(environment.get_template(template).render(policy=policy, **values))


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment


def data_uri(folder: Path, name: str) -> str:
    """A picture of a bundle as a `data:` URI.

    Raises:
        IntegrityError: It is missing, too large, no PNG file, or outside the bundle.
    """
    path = folder / name
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"the report's picture {name} is missing from {folder}", hint="export again")
    if path.stat().st_size > _MAX_PNG:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_PNG}; it was not read")
    data = path.read_bytes()
    if not data.startswith(_PNG_SIGNATURE):
        raise IntegrityError(f"{path} is not a PNG file", hint="export again")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
