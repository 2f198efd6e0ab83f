"""The HTML that a report is made of: escaped text, tables, and a page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6671; --line: #d5dbe1; --page: #ffffff;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ed; --soft: #9aa6b2; --line: #3a434d; --page: #14181c; --card: #1c2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1.02rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 48rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, "Segoe UI", Roboto, sans-serif !important; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.5rem 1rem; }
.wide { overflow-x: auto; }
.wide > svg { min-width: 40rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; min-width: 6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: .5rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .35rem 0; }
summary { cursor: pointer; color: var(--soft); }
ul.events { list-style: none; padding: 0; }
ul.events li { padding: .35rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
ul.events .kind { font-weight: 600; margin: 0 .5rem; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } }
"""

# Belt and braces: even markup that got past the escaping could neither run nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def text(value: object) -> str:
    """``value`` as HTML text; also bytes of a path that are no UTF-8 can be written."""
    return escape(str(value)).encode("utf-8", "replace").decode("utf-8")


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole HTML document; ``sections`` are HTML, the rest is text."""
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p></header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1, caption: str = "") -> str:
    """A table of texts; its first ``text_columns`` are aligned left, the others are figures."""

    def cells(tag: str, values: Sequence[object]) -> str:
        kinds = [' class="text"' if index < text_columns else "" for index in range(len(values))]
        return "".join(f"<{tag}{k}>{text(v)}</{tag}>" for k, v in zip(kinds, values, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    below = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{below}<thead><tr>{cells("th", columns)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def facts(values: Mapping[str, object]) -> str:
    """Names and values, one pair a line."""
    pairs = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values.items())
    return f"<dl>{pairs}</dl>"


def plot(svg: str, caption: str, wide: bool = False) -> str:
    """A figure; ``svg`` is an element as ``inline_svg`` makes it."""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def disclosure(summary: str, html: str) -> str:
    """``html`` behind a line that opens it, without any script."""
    return f"<details><summary>{text(summary)}</summary>{html}</details>"


def event_list(events: Iterable[Mapping[str, object]]) -> str:
    """Events with time, kind and sentence."""
    items = [
        f'<li><time class="soft">{text(event["time"])}</time><span class="kind">{text(event["event"])}</span>'
        f"{text(event['text'])}</li>"
        for event in events
    ]
    return f'<ul class="events">{"".join(items)}</ul>'
