"""Printing results: tables, hits with their images, and JSON."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from unidiff_sdk._internal.text import shorten, terminal_safe
from unidiff_sdk.cli.console import echo

if TYPE_CHECKING:
    from PIL import Image

    from unidiff_sdk.retrieval.results import Hit

__all__ = ["counted", "graphics_protocol", "print_hits", "print_table", "render_image"]

WIDE = 100  # characters of a line that has room for all columns of a hit
MAX_CELL = 24  # characters of the value of a column
MAX_LINE = 500  # characters of a cell of one line, more than the widest terminal has
LINES = 7  # lines of text that a thumbnail takes
_KITTY_CHUNK = 4096  # bytes that one escape sequence of the kitty protocol can carry


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 item", "1,200 items"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], one_line: Collection[str] = ()) -> None:
    """Print a table that fits the width of the terminal.

    Args:
        header: the names of the columns.
        rows: their cells.
        one_line: columns whose cells take one line. They share the width that the other columns leave, and longer
            texts end with an ellipsis. Other cells wrap, because a truncated id could not be used in another command.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, expand=bool(one_line))
    for name in header:
        title = Text(terminal_safe(name))
        if name in one_line:
            table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=1)
        else:
            table.add_column(title, overflow="fold", max_width=console.width // 3 if one_line else None)
    for row in rows:
        table.add_row(*(Text(terminal_safe(cell)) for cell in row))  # Text: no markup and no emoji names
    console.print(table)


def print_hits(
    hits: Sequence[Hit], offset: int = 0, thumbnails: bool | None = None, columns: Sequence[str] = ()
) -> None:
    """Print hits as a table, or one below the other with their thumbnails.

    Args:
        hits: the hits.
        offset: the number of hits on earlier pages.
        thumbnails: None shows them if the terminal supports a graphics protocol.
        columns: the columns to show, as in a filter. Default: as much of all columns as fits a wide terminal.
    """
    from rich.console import Console

    from unidiff_sdk.retrieval.columns import value_at

    if not hits:
        return
    protocol = graphics_protocol(os.environ) if sys.stdout.isatty() else ""
    if not (bool(protocol) if thumbnails is None else thumbnails):
        rest = ["columns"] if not columns and Console().width >= WIDE else []
        print_table(
            ["", "score", "id", *columns, "caption", *rest],
            (
                [
                    n,
                    f"{hit.score:.3f}",
                    hit.id,
                    *(shorten(value_at(hit.payload, column), MAX_CELL) for column in columns),
                    shorten(hit.text, MAX_LINE),
                    *(_all_columns(hit) for _ in rest),
                ]
                for n, hit in enumerate(hits, offset + 1)
            ),
            one_line=["caption", "columns"],
        )
        return
    for n, hit in enumerate(hits, offset + 1):
        click.echo(render_image(hit.thumbnail(), protocol), color=True)
        echo(f"{n}. {hit.score:.3f}  {shorten(hit.id)}  {shorten(hit.text)}", f"   {_all_columns(hit, 120)}", "")


def _all_columns(hit: Hit, length: int = MAX_LINE) -> str:
    return shorten(", ".join(f"{name}: {value}" for name, value in hit.payload.items()), length)


def graphics_protocol(environ: Mapping[str, str]) -> str:
    """The graphics protocol of the terminal with these environment variables: "kitty", "iterm", or "" for none."""
    if "TMUX" in environ or environ.get("TERM", "").startswith("screen"):
        return ""  # a terminal multiplexer does not pass the escape sequences on
    if "KITTY_WINDOW_ID" in environ or environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "iterm" if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm") else ""


def render_image(image: Image.Image, protocol: str, lines: int = LINES) -> str:
    """An image as text to print.

    Args:
        image: RGB.
        protocol: "kitty" (the kitty graphics protocol), "iterm" (inline images of iTerm2), or "" for half blocks in
            24-bit colors, which nearly every terminal supports.
        lines: the height in lines of text.
    """
    if protocol not in ("kitty", "iterm"):
        return _half_blocks(image, lines)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;height={lines};preserveAspectRatio=1:{data}\x07"
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    heads = [f"a=T,f=100,r={lines},", *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True))


def _half_blocks(image: Image.Image, lines: int) -> str:
    """Two pixels per character: the foreground color is the upper half, the background color the lower half."""
    columns = max(1, min(8 * lines, round(2 * lines * image.width / image.height)))
    pixels = image.convert("RGB").resize((columns, 2 * lines)).load()
    assert pixels is not None
    text = []
    for y in range(0, 2 * lines, 2):
        cells = []
        for x in range(columns):
            upper, lower = (";".join(map(str, pixels[x, y + half])) for half in (0, 1))  # type: ignore[arg-type]
            cells.append(f"\x1b[38;2;{upper};48;2;{lower}m▀")
        text.append("".join(cells) + "\x1b[0m")
    return "\n".join(text)
