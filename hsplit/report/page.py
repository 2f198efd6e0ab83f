"""HTML pages by jinja2: all text is escaped, and a page is a single file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class Plot:
    """A figure; ``svg`` is an element of :func:`~hsplit.report.figures.inline_svg`, the only part that is not escaped.

    Attributes:
        wide: scrolled on a narrow screen instead of shrunk.
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
    """Return a document of ``sections`` below one another."""
    return render("page.html.j2", {"title": title, "subtitle": subtitle, "sections": sections})


def render(template: str, context: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """Render ``template``, a file of this folder, with ``context`` and further ``filters``.

    Raises:
        jinja2.TemplateError: a name used by the template is missing.
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
    # bytes of a path that are not UTF-8 arrive as lone surrogates
    return html.encode("utf-8", "replace").decode("utf-8")
