"""The jinja2 templates of pages and cards, in fdu/report/templates."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates() -> Environment:
    """The templates, by their paths in fdu/report/templates; what goes into HTML is escaped."""
    return Environment(
        loader=PackageLoader("fdu.report"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
