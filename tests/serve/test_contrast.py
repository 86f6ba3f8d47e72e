"""The colors of the storefront have the contrast that WCAG 2.2 AA requires, in light and dark."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import unidiff_sdk

CSS = (Path(unidiff_sdk.__file__).parent / "serve" / "static" / "style.css").read_text(encoding="utf-8")
LIGHT, DARK = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
SCHEMES = {"light": LIGHT, "dark": LIGHT + DARK}
TEXT, PART = 4.5, 3.0  # criteria 1.4.3 and 1.4.11


def colors(scheme: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): #([0-9a-f]{3,8})", SCHEMES[scheme]))


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2.2, 0 to 1."""
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    channels = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.2, 1 to 21."""
    brighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def brightened(color: str, factor: float) -> str:
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    return "".join(f"{min(255, round(factor * int(digits[n : n + 2], 16))):02x}" for n in (0, 2, 4))


def test_formula_gives_the_published_ratios() -> None:
    assert contrast("000", "fff") == pytest.approx(21)
    assert contrast("767676", "ffffff") == pytest.approx(4.54, abs=0.005)  # the lightest gray for text on white
    assert contrast("777777", "ffffff") < TEXT


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_have_contrast(scheme: str) -> None:
    found = colors(scheme)
    for text, ground in itertools.product(("ink", "soft", "accent"), ("ground", "panel", "hover")):
        assert contrast(found[text], found[ground]) >= TEXT, (text, ground)
    factor = float(re.search(r"\.primary:hover \{.*brightness\(([\d.]+)\)", CSS)[1])
    accent, text = found["accent"], found["on-accent"]
    assert contrast(accent, text) >= TEXT
    assert contrast(brightened(accent, factor), brightened(text, factor)) >= TEXT


@pytest.mark.parametrize("scheme", SCHEMES)
def test_borders_of_inputs_and_the_focus_have_contrast(scheme: str) -> None:
    found = colors(scheme)
    assert re.search(r"input:not\(\[type\]\) \{[^}]*border: 1px solid var\(--soft\)", CSS)
    assert ":focus-visible { outline: 3px solid var(--accent)" in CSS
    for part, ground in itertools.product(("soft", "accent"), ("ground", "panel")):
        assert contrast(found[part], found[ground]) >= PART, (part, ground)


def test_all_colors_come_from_the_properties() -> None:
    """Otherwise the tests above say nothing about them. Shadows are no text."""
    rest = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    rest = re.sub(r"box-shadow:[^;]*;", "", rest)
    assert re.findall(r"#[0-9a-f]{3,8}\b(?![^{]*\{)|rgba?\(|hsl\(", rest) == []
    assert set(re.findall(r"(?<![a-z-])color: ([^;}]+)", rest)) <= {
        "inherit", "var(--ink)", "var(--soft)", "var(--accent)", "var(--on-accent)"
    }  # fmt: skip
