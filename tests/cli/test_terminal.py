"""Rendering images as text, decoded again by the rules of each protocol."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk.cli.output.terminal import graphics_protocol, render_image


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "x"}, ""),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, ""),
        ({"TERM": "xterm-256color"}, ""),
        ({}, ""),
    ],
)
def test_graphics_protocol(environ: dict[str, str], expected: str) -> None:
    assert graphics_protocol(environ) == expected


def random_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8))


def test_kitty_image_is_sent_in_chunks() -> None:
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", render_image(random_image(), "kitty", lines=5))
    assert len(parts) > 2 and all(len(data) <= 4096 for _, data in parts)
    assert parts[0][0] == "a=T,f=100,r=5,m=1" and parts[-1][0] == "m=0"
    assert {keys for keys, _ in parts[1:-1]} == {"m=1"}
    image = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in parts))))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(random_image()))


def test_iterm_image_is_sent_inline() -> None:
    found = re.fullmatch(
        r"\x1b]1337;File=inline=1;height=5;preserveAspectRatio=1:(.*)\x07", render_image(random_image(), "iterm", 5)
    )
    assert found
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1])))), np.asarray(random_image())
    )


def test_half_blocks_have_two_pixels_per_character() -> None:
    image = Image.new("RGB", (4, 4), "red")
    image.paste("blue", (0, 2, 4, 4))
    lines = render_image(image, "", lines=1).split("\n")
    cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", lines[0])
    assert len(lines) == 1 and len(cells) == 2 and lines[0].endswith("\x1b[0m")
    assert all(int(cell[0]) > 200 and int(cell[5]) > 200 for cell in cells)  # red above blue
    assert len(render_image(Image.new("RGB", (100, 1)), "", lines=3).split("\n")) == 3
