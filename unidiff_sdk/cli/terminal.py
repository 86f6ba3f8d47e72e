"""Pictures in a terminal: by its own protocol where it has one, else as colored half blocks. And words, tamed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["graphics_protocol", "render_image"]

ROWS = 7  # lines of text that a picture takes up
_KITTY_CHUNK = 4096  # the most that one escape sequence of kitty's protocol may carry


def graphics_protocol(environ: Mapping[str, str]) -> str:
    """How the terminal of these environment variables shows pictures: "kitty", "iterm", or "" for not at all."""
    if "TMUX" in environ or environ.get("TERM", "").startswith("screen"):
        return ""  # a multiplexer swallows what it does not know
    if "KITTY_WINDOW_ID" in environ or environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "iterm" if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm") else ""


def render_image(image: Image.Image, how: str, rows: int = ROWS) -> str:
    """A picture as characters to print, `rows` lines high.

    Args:
        image: RGB.
        how: "kitty" (the kitty graphics protocol) or "iterm" (iTerm2's inline images): the terminal draws it; "" draws
            it with half blocks in 24-bit colors, which nearly every terminal knows.
        rows: its height in lines.
    """
    if how not in ("kitty", "iterm"):
        return _half_blocks(image, rows)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if how == "iterm":
        return f"\x1b]1337;File=inline=1;height={rows};preserveAspectRatio=1:{data}\x07"
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    heads = [f"a=T,f=100,r={rows},", *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True))


def _half_blocks(image: Image.Image, rows: int) -> str:
    """Two pixels a character: a line's upper half has the foreground color, its lower half the background's."""
    columns = max(1, min(8 * rows, round(2 * rows * image.width / image.height)))
    pixels = image.convert("RGB").resize((columns, 2 * rows)).load()
    assert pixels is not None
    lines = []
    for y in range(0, 2 * rows, 2):
        cells = []
        for x in range(columns):
            upper, lower = (";".join(map(str, pixels[x, y + half])) for half in (0, 1))  # type: ignore[arg-type]
            cells.append(f"\x1b[38;2;{upper};48;2;{lower}m▀")
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
