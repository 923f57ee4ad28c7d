"""The one place where templates of exports are filled in: shell and Python, planner/export/templates."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.export.base import quoted

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def rendered(template: str, trim: bool = False, **given: Any) -> str:
    """A template, filled in; with ``trim`` a line that holds a block alone leaves none behind.

    Nothing is escaped, as it would be for HTML: what somebody wrote is a word of a shell (``quoted``) or a
    literal of Python (``literal``).
    """
    return _environment(trim).get_template(template).render(**given)


@cache
def _environment(trim: bool) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=trim,
        lstrip_blocks=trim,
        autoescape=False,
        comment_start_string="{##",  # bash has ${#...}
        comment_end_string="##}",
    )
    made.filters["quoted"] = lambda word: quoted([word])
    made.filters["literal"] = ascii
    return made
