"""HTML pages by jinja2: everything is escaped, and a page needs no file but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class Plot:
    """A figure; ``svg`` is an element as :func:`~hsplit.report.figures.inline_svg` makes it, the one thing not escaped.

    Attributes:
        wide: it is scrolled on a narrow screen, instead of made too small to read.
    """

    svg: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class PageSection:
    """A titled part of a page: paragraphs, names with values, figures, and a table with its columns' names."""

    title: str
    lines: Sequence[str] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    columns: Sequence[str] = ()
    rows: Iterable[Sequence[object]] = ()


def page(title: str, subtitle: str, sections: Sequence[PageSection]) -> str:
    """A document of ``sections`` below one another."""
    return render("page.html.j2", {"title": title, "subtitle": subtitle, "sections": sections})


def render(template: str, context: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """The document that ``template``, a file of this folder, makes of ``context`` with ``filters`` of its own.

    Raises:
        jinja2.TemplateError: a name that the template uses is missing.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    html = environment.get_template(template).render(context)
    # bytes of a path that are no UTF-8 arrive as lone surrogates
    return html.encode("utf-8", "replace").decode("utf-8")
