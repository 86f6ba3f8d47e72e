"""A self-contained HTML page of image cards, charts and tables, in light and dark mode, without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape as _escape
from pathlib import Path

from PIL import Image

from unidiff_sdk._internal.text import terminal_safe

__all__ = ["Card", "CardRow", "Page", "Section", "escape"]

CSS = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #ffffff; --ink: #1d1c1a; --soft: #6d6a63; --line: #e4e1da;
  --code: #f0eee8; --accent: #b4462b; --fine: #8a867d; }
@media (prefers-color-scheme: dark) { :root { --page: #131315; --card: #1d1d20; --ink: #efede8; --soft: #a5a29a;
  --line: #2d2d31; --code: #232327; --accent: #f0906f; --fine: #85827b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 56px; }
h1 { font-size: clamp(30px, 4.4vw, 46px); line-height: 1.1; letter-spacing: -0.025em; margin: 0 0 14px;
  font-weight: 680; text-wrap: balance; }
h2 { font-size: 25px; letter-spacing: -0.015em; margin: 0 0 4px; font-weight: 640; }
p { margin: 0; color: var(--soft); max-width: 72ch; text-wrap: pretty; }
p.note { font-size: 13.5px; margin-top: 12px; padding-left: 12px; border-left: 2px solid var(--accent); }
section { padding: 44px 0 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 1px; margin: 30px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 14px; overflow: hidden; }
.figures div { background: var(--card); padding: 15px 16px; }
.figures b { display: block; font-size: 21px; white-space: nowrap; font-weight: 640; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: 13px; }
.row { margin: 20px 0 30px; }
pre { background: var(--code); border-radius: 10px; padding: 11px 15px; margin: 0 0 14px; overflow-x: auto; tab-size: 4;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre .note { float: right; color: var(--fine); padding-left: 18px; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(134px, 1fr)); gap: 14px; }
.cards.large { grid-template-columns: repeat(auto-fill, minmax(176px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  position: relative; display: flex; flex-direction: column; }
figure > img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; background: var(--code);
  image-rendering: auto; image-rendering: smooth; }
figcaption { padding: 9px 11px 11px; font-size: 12.5px; line-height: 1.35; color: var(--soft); }
figcaption b { color: var(--ink); font-weight: 600; font-size: 13px; }
figcaption .top { display: flex; justify-content: space-between; gap: 8px; margin-bottom: 3px;
  font-variant-numeric: tabular-nums; }
figcaption .near { display: flex; gap: 8px; align-items: center; margin-top: 8px; padding-top: 8px;
  border-top: 1px solid var(--line); font-size: 11.5px; }
figcaption .near img { width: 34px; height: 34px; border-radius: 6px; }
.query { border: 2px solid var(--accent); }
.badge { position: absolute; top: 8px; left: 8px; background: var(--accent); color: var(--page); font-size: 11px;
  font-weight: 600; border-radius: 99px; padding: 2px 9px; }
.badge.wrong { background: var(--fine); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px;
  margin-top: 20px; }
.plot { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 10px 6px; }
.plot svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 18px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
footer { margin-top: 40px; padding-top: 22px; padding-bottom: 60px; color: var(--fine); font-size: 13px; }
footer p { color: inherit; max-width: none; }
@media (max-width: 520px) { main, header, footer { padding-left: 16px; padding-right: 16px; }
  .cards { grid-template-columns: repeat(2, 1fr); } pre .note { float: none; display: block; padding: 0; } }
@media print { section, figure, .plot { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Card:
    """An image with a caption.

    Attributes:
        image: the image.
        text: the caption.
        head: a figure above the caption, such as a score.
        right: a second figure, such as a price.
        badge: a word on the image.
        near: a small second image and its text.
        query: whether to mark the card as the query.
        wrong: whether the badge is grey instead of colored.
    """

    image: Image.Image
    text: str
    head: str = ""
    right: str = ""
    badge: str = ""
    near: tuple[Image.Image, str] | None = None
    query: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class CardRow:
    """A row of cards below a line of code or a prompt.

    Attributes:
        code: the line above the cards.
        cards: the cards.
        note: text at the right end of the line, such as a duration.
        large: whether the images are enlarged.
    """

    code: str
    cards: Sequence[Card]
    note: str = ""
    large: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and a paragraph, followed by charts, card rows, a table or code.

    Attributes:
        title: the heading.
        text: the paragraph, plain text.
        rows: rows of cards.
        table: lines of cells. The first line is the header. Cells after the first are figures.
        charts: <svg> elements from `charts.line_chart`.
        code: a block of code.
    """

    title: str
    text: str
    rows: Sequence[CardRow] = ()
    table: Sequence[Sequence[str]] = ()
    charts: Sequence[str] = ()
    code: str = ""


@dataclass(frozen=True)
class Page:
    """The whole page.

    Attributes:
        title: the heading of the page.
        text: the paragraph below it.
        figures: pairs (value, name) in a box below the paragraph.
        sections: the sections.
        note: a highlighted note below the paragraph.
        footer: lines at the end of the page.
    """

    title: str
    text: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    note: str = ""
    footer: Sequence[str] = field(default=())

    def write(self, path: Path) -> Path:
        """Write the page with its images inlined, and return its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def html(self) -> str:
        """The page as HTML."""
        figures = "".join(
            f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in self.figures
        )
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{escape(self.title)}</title><link rel="icon" href="data:,"><style>{CSS}</style></head><body>\n'
            f"<header><h1>{escape(self.title)}</h1><p>{escape(self.text)}</p>{note}"
            f'<div class="figures">{figures}</div></header>\n'
            f"<main>{''.join(_section(section) for section in self.sections)}</main>\n"
            f"<footer>{''.join(f'<p>{escape(line)}</p>' for line in self.footer)}</footer></body></html>\n"
        )


def _section(section: Section) -> str:
    rows = "".join(_row(row) for row in section.rows)
    head = f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>"
    charts = "".join(f'<div class="plot">{chart}</div>' for chart in section.charts)
    plots = f'<div class="plots">{charts}</div>' if charts else ""
    code = f'<div class="row"><pre>{_lines(section.code)}</pre></div>' if section.code else ""
    return f"<section>{head}{plots}{rows}{_table(section.table)}{code}</section>\n"


def _row(row: CardRow) -> str:
    note = f'<span class="note">{escape(row.note)}</span>' if row.note else ""
    cards = "".join(_card(card) for card in row.cards)
    return (
        f'<div class="row"><pre>{note}{escape(row.code)}</pre>'
        f'<div class="cards{" large" if row.large else ""}">{cards}</div></div>\n'
    )


def _card(card: Card) -> str:
    kind = "badge wrong" if card.wrong else "badge"
    badge = f'<span class="{kind}">{escape(card.badge)}</span>' if card.badge else ""
    top = f'<div class="top"><b>{escape(card.head)}</b><span>{escape(card.right)}</span></div>'
    near = ""
    if card.near:
        image, text = card.near
        near = f'<div class="near"><img src="{data_url(image, 68)}" alt=""><span>{escape(text)}</span></div>'
    return (
        f"<figure{' class=query' if card.query else ''}>{badge}"
        f'<img src="{data_url(card.image)}" alt="{escape(card.text)}" loading="lazy">'
        f"<figcaption>{top if card.head or card.right else ''}{escape(card.text)}{near}</figcaption></figure>"
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""

    def cells(line: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if column else ''}>{escape(cell)}</{tag}>" for column, cell in enumerate(line)
        )

    head, *body = lines
    rest = "".join(f"<tr>{cells(line, 'td')}</tr>" for line in body)
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{rest}</tbody></table></div>'


def _lines(code: str) -> str:
    return "\n".join(map(escape, code.split("\n")))


def escape(text: str) -> str:
    """A text on one line for the body of an element or a quoted attribute. Marks of text direction are shown."""
    return _escape(terminal_safe(text))


def data_url(image: Image.Image, size: int | None = None) -> str:
    """An image as a WebP data URL, at most `size` pixels wide."""
    if size and image.width > size:
        image = image.resize((size, round(size * image.height / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
