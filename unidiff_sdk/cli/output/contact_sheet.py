"""A contact sheet: all images of a generation with their scores, seeds and nearest catalog items."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk.catalog.results import Generated, Generation

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

__all__ = ["contact_sheet"]

_IMAGE, _NEAREST, _GAP, _LINE = 256, 96, 12, 18  # pixels
_MAX_COLUMNS = 4


def contact_sheet(generation: Generation) -> Image.Image:
    """Lay out the images in rows of up to four, each above its score, seed, prompt and nearest item. Returns RGB."""
    columns = min(_MAX_COLUMNS, max(1, len(generation)))
    width, height = _IMAGE + _GAP, _IMAGE + _NEAREST + 2 * _GAP
    rows = math.ceil(len(generation) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, max(1, rows) * height + _GAP), "white")
    font = ImageFont.load_default(13)
    for i, generated in enumerate(generation):
        _paste_card(sheet, generated, _GAP + i % columns * width, _GAP + i // columns * height, font)
    return sheet


def _paste_card(sheet: Image.Image, generated: Generated, left: int, top: int, font: FreeTypeFont | BitmapFont) -> None:
    _paste_image(sheet, generated.image, left, top, _IMAGE)
    below = top + _IMAGE + _GAP // 2
    lines = [f"score {generated.score:.3f}   seed {generated.seed}", generated.prompt]
    text_left = left
    if generated.nearest is not None:
        _paste_image(sheet, generated.nearest.thumbnail(), left, below, _NEAREST)
        text_left += _NEAREST + _GAP // 2
        lines += [f"nearest {generated.nearest.score:.3f}", generated.nearest.text or str(generated.nearest.id)]
    draw = ImageDraw.Draw(sheet)
    for n, line in enumerate(lines):
        draw.text((text_left, below + n * _LINE), _truncate(draw, line, left + _IMAGE - text_left, font), "black", font)


def _paste_image(sheet: Image.Image, image: Image.Image, left: int, top: int, side: int) -> None:
    """Paste an image centered in a square, as large as fits. Small images are enlarged with sharp pixels."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    resampling = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    sheet.paste(image.resize(size, resampling), (left + (side - size[0]) // 2, top + (side - size[1]) // 2))


def _truncate(draw: ImageDraw.ImageDraw, text: str, width: int, font: FreeTypeFont | BitmapFont) -> str:
    """The text on one line, with an ellipsis if it is wider than `width` pixels."""
    text = " ".join(terminal_safe(text).split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
