"""Rendering product images from outlines, with cloth patterns, soft light and a shadow on a studio background.

Coordinates are fractions of the image, x to the right and y down. A product is a list of parts, rendered back to front.
A part is an outline with a paint: the cloth of the product (color and pattern), a darker shade of it, or a material.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Points = list[tuple[float, float]]
Floats = NDArray[np.float32]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (204, 40, 44),
    "orange": (240, 132, 36),
    "yellow": (244, 206, 60),
    "green": (62, 152, 68),
    "teal": (24, 148, 150),
    "blue": (44, 92, 204),
    "purple": (126, 62, 170),
    "pink": (242, 138, 182),
    "brown": (124, 78, 46),
    "black": (44, 44, 50),
    "white": (246, 246, 244),
    "navy": (26, 36, 84),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "grey": (206, 208, 212),
    "beige": (236, 224, 204),
    "sky": (206, 226, 242),
    "mint": (208, 236, 220),
    "rose": (246, 218, 220),
}
MATERIALS: dict[str, tuple[int, int, int]] = {
    "steel": (176, 180, 188),
    "wood": (170, 124, 80),
    "dark": (66, 62, 66),
    "light": (238, 236, 230),
    "lining": (222, 214, 204),
}


@dataclass(frozen=True)
class Part:
    """One part of a product.

    Attributes:
        outline: a closed polygon.
        paint: "cloth", "shade" (the color of the cloth, darker and without pattern) or a key of `MATERIALS`.
        relief: how strongly the light shows its shape; 0 is flat.
    """

    outline: Points
    paint: str = "cloth"
    relief: float = 1.0


@dataclass(frozen=True)
class Pose:
    """The position of a product: shift in fractions of the image, rotation in radians, and scale."""

    dx: float = 0.0
    dy: float = 0.0
    turn: float = 0.0
    scale: float = 1.0


# ---------------------------------------------------------------------------------------------------- outlines


def curve(points: Points, steps: int = 8) -> Points:
    """A closed Catmull-Rom spline through `points`. A repeated point is a corner."""
    p = np.asarray(points, dtype=np.float64)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (q[:, None] for q in (before, p, after, beyond))
    spline = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    spline = spline[(p != after).any(axis=1)]  # between the two copies of a corner, the spline would make a loop
    return [(float(x), float(y)) for x, y in spline.reshape(-1, 2)]


def mirrored(half: Points) -> Points:
    """The symmetric outline with the right half `half`: (distance from the center, y), from top to bottom."""
    return [(0.5 + x, y) for x, y in half] + [(0.5 - x, y) for x, y in reversed(half)]


def flipped(points: Points) -> Points:
    """The outline mirrored at the vertical center line of the image."""
    return [(1 - x, y) for x, y in points]


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 28) -> Points:
    """An ellipse around (x, y)."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return [(float(x + rx * c), float(y + ry * s)) for c, s in zip(np.cos(angle), np.sin(angle), strict=True)]


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def band(points: Sequence[tuple[float, float]], width: float) -> Points:
    """A band of `width` along a path."""
    p = np.asarray(points, dtype=np.float64)
    along = np.gradient(p, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.stack([-along[:, 1], along[:, 0]], axis=1) * width / 2
    return [(float(x), float(y)) for x, y in np.concatenate([p + side, (p - side)[::-1]])]


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float, n: int = 16) -> Points:
    """An arc of an ellipse. Angles are in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, stop, n))
    return [(float(x + rx * np.cos(a)), float(y + ry * np.sin(a))) for a in angle]


# ---------------------------------------------------------------------------------------------------- garments
# `wide` and `long` are from 0 to 1: slim to loose and short to long, or slim to wide and low to tall.


def _torso(wide: float, long: float, *, flare: float = 0.0, neck: float = 0.07) -> tuple[Points, float, float]:
    half, hem = 0.135 + 0.085 * wide, 0.58 + 0.26 * long
    outline = curve(
        mirrored([(neck, 0.17), (half + 0.035, 0.21), (half + 0.01, 0.36), (half + flare, hem), (half + flare, hem)])
    )
    return outline, half, hem


def _sleeves(half: float, end: float, *, cuff: float = 0.055, spread: float = 0.0) -> list[Part]:
    """Two sleeves from the shoulders down to y = `end`."""
    out = half + 0.095 + 0.16 * (end - 0.35) + spread
    arm = [
        (0.5 + half - 0.02, 0.19),
        (0.5 + half + 0.05, 0.215),
        (0.5 + out + cuff, end),
        (0.5 + out + cuff, end),
        (0.5 + out - cuff, end + 0.025),
        (0.5 + out - cuff, end + 0.025),
        (0.5 + half - 0.03, 0.36),
    ]
    right = curve(arm)
    return [Part(right), Part(flipped(right))]


def t_shirt(wide: float, long: float) -> list[Part]:
    body, half, _ = _torso(wide, long)
    return [*_sleeves(half, 0.38, cuff=0.065), Part(body), Part(ellipse(0.5, 0.172, 0.082, 0.04), "shade", 0.3)]


def shirt(wide: float, long: float) -> list[Part]:
    body, half, hem = _torso(wide, long)
    collar = [(0.5, 0.235), (0.585, 0.145), (0.615, 0.195), (0.545, 0.29)]
    buttons = [Part(ellipse(0.5, y, 0.013, 0.013, 12), "light", 0) for y in np.arange(0.32, hem - 0.04, 0.09)]
    return [
        *_sleeves(half, 0.66, cuff=0.042),
        Part(body),
        Part(box(0.478, 0.22, 0.522, hem - 0.005), "shade", 0.2),
        Part(collar, "light", 0.5),
        Part(flipped(collar), "light", 0.5),
        *buttons,
    ]


def sweater(wide: float, long: float) -> list[Part]:
    body, half, hem = _torso(wide, long)
    cuffs = []
    out = half + 0.095 + 0.16 * 0.32
    right = band([(0.5 + out - 0.056, 0.70), (0.5 + out + 0.056, 0.675)], 0.06)
    cuffs = [Part(right, "shade", 0.4), Part(flipped(right), "shade", 0.4)]
    return [
        *_sleeves(half, 0.67, cuff=0.055),
        *cuffs,
        Part(body),
        Part(box(0.5 - half - 0.006, hem - 0.055, 0.5 + half + 0.006, hem + 0.012), "shade", 0.5),
        Part(ellipse(0.5, 0.175, 0.098, 0.052), "shade", 0.6),
        Part(ellipse(0.5, 0.166, 0.066, 0.03), "dark", 0),
    ]


def hoodie(wide: float, long: float) -> list[Part]:
    body, half, hem = _torso(wide, long)
    hood = curve([(0.37, 0.24), (0.385, 0.12), (0.5, 0.055), (0.615, 0.12), (0.63, 0.24), (0.5, 0.31)])
    low = hem - 0.05
    pocket = [(0.5 - 0.1, low), (0.5 - 0.06, low - 0.14), (0.5 + 0.06, low - 0.14), (0.5 + 0.1, low)]
    return [
        *_sleeves(half, 0.67),
        Part(body),
        Part(hood),
        Part(curve([(0.43, 0.2), (0.5, 0.1), (0.57, 0.2), (0.5, 0.275)]), "dark", 0.4),
        Part(box(0.462, 0.27, 0.474, 0.40), "light", 0),
        Part(box(0.526, 0.27, 0.538, 0.40), "light", 0),
        Part(pocket, "shade", 0.7),
    ]


def jacket(wide: float, long: float) -> list[Part]:
    body, half, hem = _torso(wide, long)
    lapel = [(0.565, 0.16), (0.63, 0.2), (0.6, 0.33), (0.53, 0.45)]
    flap = band([(0.5 + half * 0.4, hem - 0.15), (0.5 + half * 0.9, hem - 0.15)], 0.035)
    return [
        *_sleeves(half, 0.67),
        Part(body),
        Part([(0.44, 0.165), (0.56, 0.165), (0.535, 0.45), (0.555, hem), (0.445, hem), (0.465, 0.45)], "light", 0.6),
        Part(lapel, "shade", 0.8),
        Part(flipped(lapel), "shade", 0.8),
        Part(flap, "shade", 0.4),
        Part(flipped(flap), "shade", 0.4),
    ]


def vest(wide: float, long: float) -> list[Part]:
    half, hem = 0.15 + 0.085 * wide, 0.58 + 0.26 * long
    half_outline = [
        (0.065, 0.15),
        (0.125, 0.16),
        (0.105, 0.27),
        (half, 0.38),
        (half, hem),
        (half, hem),
        (0.0, hem + 0.05),
    ]
    buttons = [Part(ellipse(0.5, y, 0.014, 0.014, 12), "dark", 0) for y in np.arange(0.46, hem, 0.085)]
    return [
        Part(ellipse(0.5, 0.165, 0.08, 0.035), "lining", 0),
        Part(curve(mirrored(half_outline))),
        Part([(0.435, 0.145), (0.565, 0.145), (0.5, 0.42)], "lining", 0.5),
        Part(box(0.495, 0.42, 0.505, hem + 0.03), "dark", 0),
        *buttons,
    ]


def _legs(hip: float, ankle: float, end: float, top: float = 0.14) -> list[Part]:
    leg = [(0.492, top), (0.5 + hip - 0.02, top), (0.5 + hip, top + 0.13)]
    leg += [(0.5 + 0.045 + 2 * ankle, end), (0.5 + 0.045, end), (0.507, top + 0.2)]
    return [Part(flipped(leg)), Part(leg)]


def trousers(wide: float, long: float) -> list[Part]:
    hip = 0.155 + 0.04 * wide
    return [
        *_legs(hip, 0.04 + 0.055 * wide, 0.66 + 0.24 * long, 0.12),
        Part(box(0.5 - hip + 0.014, 0.095, 0.5 + hip - 0.014, 0.145), "shade", 0.5),
        Part(box(0.487, 0.107, 0.513, 0.133), "steel", 0),
    ]


def shorts(wide: float, long: float) -> list[Part]:
    hip = 0.19 + 0.06 * wide
    return [
        *_legs(hip, 0.085 + 0.045 * wide, 0.5 + 0.17 * long, 0.25),
        Part(box(0.5 - hip + 0.014, 0.225, 0.5 + hip - 0.014, 0.275), "shade", 0.5),
        Part(band([(0.48, 0.27), (0.47, 0.37)], 0.012), "light", 0),
        Part(band([(0.52, 0.27), (0.53, 0.37)], 0.012), "light", 0),
    ]


def dress(wide: float, long: float) -> list[Part]:
    flare, hem = 0.15 + 0.15 * wide, 0.62 + 0.28 * long
    half = [
        (0.065, 0.1),
        (0.115, 0.11),
        (0.105, 0.2),
        (0.125, 0.27),
        (0.09, 0.4),
        (0.09, 0.4),
        (flare, hem),
        (flare, hem),
    ]
    return [
        Part(curve(mirrored([*half, (0, hem + 0.02)]))),
        Part(curve([(0.43, 0.09), (0.43, 0.09), (0.57, 0.09), (0.57, 0.09), (0.5, 0.2)]), "lining", 0.4),
        Part(box(0.5 - 0.095, 0.385, 0.5 + 0.095, 0.42), "shade", 0.4),
    ]


def skirt(wide: float, long: float) -> list[Part]:
    flare, hem = 0.17 + 0.17 * wide, 0.56 + 0.3 * long
    cloth = curve(
        mirrored([(0.12, 0.22), (0.12, 0.22), (flare * 0.8, 0.4), (flare, hem), (flare, hem), (0, hem + 0.03)])
    )
    pleats = [Part(band([(0.5 + 0.45 * s, 0.28), (0.5 + s * 2.1, hem)], 0.012), "shade", 0) for s in (-0.07, 0.0, 0.07)]
    return [Part(cloth), *pleats, Part(box(0.375, 0.185, 0.625, 0.24), "shade", 0.6)]


def blouse(wide: float, long: float) -> list[Part]:
    body, half, _ = _torso(wide, long - 0.15, flare=0.035)
    out = 0.5 + half + 0.085
    puff = ellipse(out, 0.3, 0.085, 0.115)
    cuff = box(out - 0.055, 0.395, out + 0.055, 0.425)
    loop = curve([(0.5, 0.24), (0.575, 0.19), (0.6, 0.24), (0.575, 0.285)])
    return [
        *(Part(p) for p in (puff, flipped(puff))),
        *(Part(p, "shade", 0.5) for p in (cuff, flipped(cuff))),
        Part(body),
        *(Part(p, "shade", 0.8) for p in (loop, flipped(loop))),
        Part(band([(0.49, 0.25), (0.465, 0.39)], 0.025), "shade", 0.4),
        Part(band([(0.51, 0.25), (0.535, 0.39)], 0.025), "shade", 0.4),
    ]


def tank_top(wide: float, long: float) -> list[Part]:
    half, hem = 0.125 + 0.08 * wide, 0.56 + 0.24 * long
    strap = band([(0.575, 0.1), (0.585, 0.26)], 0.03)
    neck = [(0.045, 0.29), (0.1, 0.235), (half, 0.31), (half, 0.31), (half - 0.01, 0.45), (half + 0.015, hem)]
    body = curve(mirrored([*neck, (half + 0.015, hem)]))
    return [Part(strap), Part(flipped(strap)), Part(body)]


def coat(wide: float, long: float) -> list[Part]:
    half, hem = 0.14 + 0.075 * wide, 0.72 + 0.2 * long
    body = curve(mirrored([(0.07, 0.12), (half + 0.03, 0.16), (half, 0.32), (half + 0.06, hem), (half + 0.06, hem)]))
    lapel = [(0.5, 0.34), (0.56, 0.1), (0.64, 0.15), (0.6, 0.26)]
    buttons = [Part(ellipse(x, y, 0.016, 0.016, 12), "dark", 0) for x in (0.455, 0.545) for y in (0.4, 0.6, 0.7)]
    return [
        *_sleeves(half, 0.62, cuff=0.05),
        Part(body),
        Part(box(0.495, 0.3, 0.505, hem), "dark", 0),
        Part(lapel, "shade", 0.8),
        Part(flipped(lapel), "shade", 0.8),
        Part(box(0.5 - half - 0.012, 0.475, 0.5 + half + 0.012, 0.53), "dark", 0.5),
        Part(box(0.47, 0.47, 0.53, 0.535), "steel", 0.3),
        *buttons,
    ]


def jumpsuit(wide: float, long: float) -> list[Part]:
    strap = band([(0.57, 0.08), (0.565, 0.22)], 0.03)
    chest = curve(mirrored([(0.08, 0.19), (0.12, 0.21), (0.105, 0.42), (0.105, 0.42)]))
    return [
        Part(strap),
        Part(flipped(strap)),
        *_legs(0.13 + 0.045 * wide, 0.04 + 0.065 * wide, 0.7 + 0.22 * long, 0.4),
        Part(chest),
        Part(box(0.39, 0.395, 0.61, 0.43), "dark", 0.4),
    ]


def boots(wide: float, long: float) -> list[Part]:
    top, half = 0.52 - 0.34 * long, 0.052 + 0.028 * wide
    parts: list[Part] = []
    for x in (0.3, 0.66):
        outline = [(x - half, top), (x - half, top), (x + half, top), (x + half, top), (x + half * 0.9, 0.68)]
        outline += [(x + 0.15, 0.74), (x + 0.185, 0.81), (x + 0.17, 0.84), (x - half, 0.84), (x - half, 0.84)]
        parts += [
            Part(curve(outline)),
            Part([(x - half, 0.83), (x + 0.18, 0.83), (x + 0.185, 0.865), (x - half, 0.865)], "dark", 0.3),
            Part(box(x - half, 0.86, x - half + 0.06, 0.915), "dark", 0.3),
            Part(box(x - half - 0.006, top - 0.012, x + half + 0.006, top + 0.03), "shade", 0.5),
        ]
    return parts


def handbag(wide: float, long: float) -> list[Part]:
    half, top = 0.2 + 0.12 * wide, 0.52 - 0.14 * long
    body = [(half * 0.85, top), (half * 0.85, top), (half, 0.72), (half * 0.98, 0.84), (half * 0.98, 0.84)]
    flap = curve(mirrored([(half * 0.86, top - 0.005), (half * 0.86, top - 0.005), (half * 0.7, top + 0.15)]))
    return [
        Part(band(arc(0.5, top + 0.02, half * 0.55, 0.26, 180, 360), 0.034), "shade", 0.5),
        Part(curve(mirrored(body))),
        Part(flap, "shade", 0.8),
        Part(ellipse(0.5, top + 0.155, 0.028, 0.028, 16), "steel", 0.4),
    ]


# ---------------------------------------------------------------------------------------------------- goods


def mug(wide: float, long: float) -> list[Part]:
    half, top = 0.14 + 0.09 * wide, 0.48 - 0.2 * long
    grip = band(arc(0.5 + half - 0.01, (top + 0.8) / 2, 0.13, 0.3 * (0.8 - top), -95, 95), 0.045)
    body = curve(mirrored([(half, top), (half, top), (half, 0.7), (half * 0.9, 0.81), (half * 0.5, 0.83)]))
    rim = (
        Part(ellipse(0.5, top, half, 0.045), "light", 0.3),
        Part(ellipse(0.5, top + 0.006, half * 0.87, 0.033), "dark", 0),
    )
    return [Part(grip, "shade", 0.6), Part(body), *rim]


def bottle(wide: float, long: float) -> list[Part]:
    half, top = 0.09 + 0.075 * wide, 0.34 - 0.2 * long
    half_outline = [(0.042, top), (0.042, top), (0.042, top + 0.1), (half, top + 0.21), (half, 0.5), (half, 0.84)]
    return [
        Part(curve(mirrored([*half_outline, (half * 0.9, 0.87), (0, 0.88)]))),
        Part(box(0.447, top - 0.045, 0.553, top + 0.035), "steel", 0.6),
    ]


def vase(wide: float, long: float) -> list[Part]:
    half, top = 0.13 + 0.11 * wide, 0.42 - 0.27 * long
    drop = 0.86 - top
    neck = 0.4 * half
    belly = [(neck + 0.05, top), (neck + 0.05, top), (neck, top + 0.16 * drop), (half, top + 0.55 * drop)]
    return [
        Part(curve(mirrored([*belly, (half * 0.75, 0.82), (half * 0.55, 0.86), (half * 0.55, 0.86)]))),
        Part(ellipse(0.5, top, neck + 0.05, 0.026), "dark", 0),
    ]


def lamp(wide: float, long: float) -> list[Part]:
    half, top = 0.17 + 0.13 * wide, 0.36 - 0.24 * long
    foot = 0.62 * half
    return [
        Part(box(0.483, top + 0.2, 0.517, 0.84), "wood", 0.5),
        Part(curve(mirrored([(foot * 0.6, 0.82), (foot, 0.86), (foot, 0.88), (0, 0.89)])), "wood", 0.6),
        Part([(0.5 - half * 0.55, top), (0.5 + half * 0.55, top), (0.5 + half, top + 0.3), (0.5 - half, top + 0.3)]),
    ]


def backpack(wide: float, long: float) -> list[Part]:
    half, top = 0.17 + 0.085 * wide, 0.36 - 0.18 * long
    body = [(half * 0.5, top), (half * 0.92, top + 0.07), (half, 0.6), (half, 0.84), (half * 0.8, 0.87), (0, 0.875)]
    strap = band(arc(0.5 + half * 0.95, 0.56, 0.075, 0.22, -90, 90), 0.042)
    pocket = curve(mirrored([(half * 0.55, 0.6), (half * 0.68, 0.62), (half * 0.72, 0.8), (half * 0.6, 0.83)]))
    return [
        Part(strap, "dark", 0.4),
        Part(flipped(strap), "dark", 0.4),
        Part(band(arc(0.5, top + 0.01, 0.06, 0.07, 180, 360), 0.03), "dark", 0.4),
        Part(curve(mirrored(body))),
        Part(pocket, "shade", 0.8),
        Part(box(0.5 - half * 0.62, 0.64, 0.5 + half * 0.62, 0.655), "light", 0),
    ]


def chair(wide: float, long: float) -> list[Part]:
    half, top = 0.14 + 0.085 * wide, 0.36 - 0.24 * long
    legs = [band([(0.5 + s * half * 0.8, 0.6), (0.5 + s * (half + 0.035), 0.9)], 0.034) for s in (-1, 1)]
    back = curve(mirrored([(half * 0.7, top), (half * 0.95, top + 0.05), (half * 0.9, 0.56), (half * 0.9, 0.56)]))
    seat = curve(mirrored([(half, 0.53), (half + 0.05, 0.6), (half + 0.045, 0.66), (half * 0.9, 0.67)]))
    return [*(Part(leg, "wood", 0.5) for leg in legs), Part(back), Part(seat)]


def cushion(wide: float, long: float) -> list[Part]:
    half, tall = 0.2 + 0.14 * wide, 0.17 + 0.14 * long
    corner, waist = 1.0, 0.9
    right = [(0, -tall * waist), (half * corner, -tall), (half * waist, 0), (half * corner, tall), (0, tall * waist)]
    outline = [(0.5 + x, 0.54 + y) for x, y in right] + [(0.5 - x, 0.54 + y) for x, y in reversed(right[1:-1])]
    return [Part(curve(outline), relief=1.6)]


def teapot(wide: float, long: float) -> list[Part]:
    half, top = 0.14 + 0.07 * wide, 0.5 - 0.16 * long
    middle = (top + 0.82) / 2
    spout = [(0.5 + half * 0.7, middle + 0.08), (0.5 + half + 0.08, middle - 0.02), (0.5 + half + 0.15, top)]
    grip = band(arc(0.5 - half + 0.02, middle, 0.12, 0.36 * (0.82 - top), 90, 270), 0.04)
    return [
        Part(grip, "shade", 0.6),
        Part(band(curve_through(spout), 0.055), "shade", 0.6),
        Part(ellipse(0.5, middle, half, (0.82 - top) / 2)),
        Part(box(0.5 - half * 0.6, 0.8, 0.5 + half * 0.6, 0.835), "shade", 0.4),
        Part(ellipse(0.5, top + 0.025, half * 0.6, 0.04), "shade", 0.6),
        Part(ellipse(0.5, top - 0.025, 0.03, 0.03, 16), "dark", 0.5),
    ]


def curve_through(points: Points, n: int = 12) -> Points:
    """A quadratic Bézier curve with three control points."""
    a, b, c = (np.asarray(p) for p in points)
    t = np.linspace(0, 1, n)[:, None]
    return [(float(x), float(y)) for x, y in (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c]


SHAPES: dict[str, Callable[[float, float], list[Part]]] = {
    "t-shirt": t_shirt,
    "shirt": shirt,
    "sweater": sweater,
    "hoodie": hoodie,
    "jacket": jacket,
    "vest": vest,
    "trousers": trousers,
    "shorts": shorts,
    "dress": dress,
    "skirt": skirt,
    "blouse": blouse,
    "tank top": tank_top,
    "coat": coat,
    "jumpsuit": jumpsuit,
    "boots": boots,
    "handbag": handbag,
    "mug": mug,
    "bottle": bottle,
    "vase": vase,
    "lamp": lamp,
    "backpack": backpack,
    "chair": chair,
    "cushion": cushion,
    "teapot": teapot,
}


# ---------------------------------------------------------------------------------------------------- rendering


def _weave(pattern: str, x: Floats, y: Floats, pixel: float) -> Floats:
    """The share of the second color at each position, from 0 to 1, with soft edges of about a pixel.

    The second color covers about a quarter to a third of the cloth, so that the first color stays the main one.
    """

    def stripes(u: Floats, period: float, share: float) -> Floats:
        distance = np.abs((u / period) % 1.0 - 0.5) * period  # to the center of the stripe
        return soft(share * period / 2 - distance)

    def soft(inside: Floats) -> Floats:
        shown: Floats = np.clip(inside / pixel + 0.5, 0.0, 1.0).astype(np.float32)
        return shown

    match pattern:
        case "striped":
            return stripes(y, 0.15, 0.36)
        case "diagonal":
            return stripes((x + y) * np.float32(np.sqrt(0.5)), 0.15, 0.36)
        case "checked":
            crossing: Floats = np.maximum(stripes(x, 0.16, 0.2), stripes(y, 0.16, 0.2))
            return crossing
        case "dotted":
            row = np.floor(y / 0.11)
            dx = ((x / 0.13 + 0.5 * (row % 2)) % 1.0 - 0.5) * 0.13
            dy = (y / 0.11 % 1.0 - 0.5) * 0.11
            return soft(0.036 - np.hypot(dx, dy))
        case "solid":
            return np.zeros_like(x)
    raise ValueError(f"no such pattern: {pattern!r}")


def _mask(outline: Points, pose: Pose, side: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    p = (np.asarray(outline) - 0.5) * pose.scale
    c, s = np.cos(pose.turn), np.sin(pose.turn)
    p = p @ np.array([[c, s], [-s, c]]) + 0.5 + [pose.dx, pose.dy]
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in p * side], fill=255)
    return mask, mask.getbbox() or (0, 0, 1, 1)


def render_product(
    type: str,
    color: str,
    second_color: str | None,
    pattern: str,
    *,
    wide: float,
    long: float,
    background: str,
    pose: Pose = Pose(),
    light: float = 0.6,
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0),
    size: int = 64,
) -> Image.Image:
    """Render one product.

    Args:
        type: a key of `SHAPES`.
        color: a key of `COLORS`.
        second_color: a key of `COLORS`, the color of the pattern. Unused if the pattern is "solid".
        pattern: "solid", "striped", "diagonal", "checked" or "dotted".
        wide, long: the cut, from 0 (slim, short) to 1 (loose, long).
        background: a key of `BACKGROUNDS`.
        pose: position, rotation and scale.
        light: the position of the light, from 0 (left) to 1 (right).
        tint: factors on the red, green and blue of the cloth, because dyes differ.
        size: width and height in pixels.

    Returns:
        An RGB image.
    """
    side = size * (3 if size <= 128 else 2)  # supersampling; the box filter at the end is the anti-aliasing
    v, u = np.meshgrid(*[(np.arange(side, dtype=np.float32) + 0.5) / side] * 2, indexing="ij")

    # 1. The studio: a soft gradient that is brighter near the light
    wall = np.asarray(BACKGROUNDS[background], np.float32)
    glow = 1.03 - 0.10 * np.hypot(u - light, v - 0.3)[..., None]
    canvas = wall * glow.astype(np.float32)

    # 2. The parts of the product, and their common shadow
    parts = SHAPES[type](wide, long)
    masks = [_mask(part.outline, pose, side) for part in parts]
    silhouette = Image.new("L", (side, side))
    for mask, _ in masks:
        silhouette.paste(255, mask=mask)
    shadow = silhouette.filter(ImageFilter.GaussianBlur(side * 0.022))
    offset = (round(side * (0.5 - light) * 0.07), round(side * 0.022))
    cast = Image.new("L", (side, side))
    cast.paste(shadow, offset)
    canvas *= 1.0 - 0.30 * (np.asarray(cast, np.float32) / 255)[..., None]

    # 3. The cloth, in the rotated coordinates of the product
    c, s = np.cos(-pose.turn), np.sin(-pose.turn)
    du, dv = (u - 0.5 - pose.dx) / pose.scale, (v - 0.5 - pose.dy) / pose.scale
    x, y = (du * c - dv * s).astype(np.float32) + 0.5, (du * s + dv * c).astype(np.float32) + 0.5
    base = np.asarray(COLORS[color], np.float32) * np.asarray(tint, np.float32)
    cloth = np.broadcast_to(base, (side, side, 3))
    if pattern != "solid" and second_color is not None:
        second = _weave(pattern, x, y, 1.5 / size)[..., None]
        cloth = cloth * (1 - second) + np.asarray(COLORS[second_color], np.float32) * second

    # 4. Back to front: each part is lit as a soft relief whose height is its blurred mask
    for part, (mask, (left, top, right, bottom)) in zip(parts, masks, strict=True):
        area = np.s_[top:bottom, left:right]
        alpha = np.asarray(mask, np.float32)[area][..., None] / 255
        match part.paint:
            case "cloth":
                pixels = cloth[area]
            case "shade":
                pixels = np.broadcast_to(base * 0.72 + 6, (*alpha.shape[:2], 3))
            case material:
                pixels = np.broadcast_to(np.asarray(MATERIALS[material], np.float32), (*alpha.shape[:2], 3))
        lit: Any = 1.0
        if part.relief:
            height = np.asarray(mask.filter(ImageFilter.GaussianBlur(side * 0.035)), np.float32) / 255
            slope_y, slope_x = np.gradient(height, 1 / side)
            toward = (0.5 - light) * 1.2 * slope_x + 0.6 * slope_y
            lit = (0.80 + 0.24 * height + 0.018 * part.relief * toward)[area][..., None]
        canvas[area] = canvas[area] * (1 - alpha) + np.clip(pixels * lit, 0, 255) * alpha

    big: Any = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(big).resize((size, size), Image.Resampling.BOX)
