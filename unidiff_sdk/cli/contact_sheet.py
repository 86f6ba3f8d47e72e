"""All pictures of a generation on one sheet, each with its nearest catalog item, so that copies are seen at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from unidiff_sdk.catalog.results import Generated, Generation

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

__all__ = ["contact_sheet"]

_PICTURE, _NEAREST, _GAP, _LINE = 256, 96, 12, 18
_MOST_COLUMNS = 4


def contact_sheet(generation: Generation) -> Image.Image:
    """The pictures in their order, up to four in a row, with score, seed and nearest item below each; RGB."""
    columns = min(_MOST_COLUMNS, max(1, len(generation)))
    width, height = _PICTURE + _GAP, _PICTURE + _NEAREST + 2 * _GAP
    rows = math.ceil(len(generation) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, max(1, rows) * height + _GAP), "white")
    font = ImageFont.load_default(13)
    for i, picture in enumerate(generation):
        _paste(sheet, picture, _GAP + i % columns * width, _GAP + i // columns * height, font)
    return sheet


def _paste(sheet: Image.Image, picture: Generated, left: int, top: int, font: FreeTypeFont | BitmapFont) -> None:
    _place(sheet, picture.image, left, top, _PICTURE)
    below = top + _PICTURE + _GAP // 2
    lines = [f"score {picture.score:.3f}   seed {picture.seed}", picture.prompt]
    text_left = left
    if picture.nearest is not None:
        _place(sheet, picture.nearest.thumbnail(), left, below, _NEAREST)
        text_left += _NEAREST + _GAP // 2
        lines += [f"nearest {picture.nearest.score:.3f}", picture.nearest.text or str(picture.nearest.id)]
    draw = ImageDraw.Draw(sheet)
    for n, line in enumerate(lines):
        shown = _shortened(draw, line, left + _PICTURE - text_left, font)
        draw.text((text_left, below + n * _LINE), shown, "black", font)


def _place(sheet: Image.Image, image: Image.Image, left: int, top: int, side: int) -> None:
    """A picture in a square, as large as fits; small ones enlarged by whole pixels."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    kind = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    sheet.paste(image.resize(size, kind), (left + (side - size[0]) // 2, top + (side - size[1]) // 2))


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int, font: FreeTypeFont | BitmapFont) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
