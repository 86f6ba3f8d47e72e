"""Line charts as SVG, in light and dark mode, without a plotting library or scripts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .html import escape

__all__ = ["Line", "line_chart"]

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, BOTTOM = 62, 16, 46  # margins; above the plot are the title and the legend
ROW = 18  # height of a line of text
LETTER = 6.6  # upper bound of the average width of a letter, in pixels
MARKED = 40  # a line of at most this many points shows a marker at each
# Mid-tones that are visible on white and black and distinct for color-blind readers (after Okabe and Ito).
COLORS = ("#d1495b", "#2e86ab", "#3a9d6e", "#c28e0e", "#8e6bbf", "#c46210", "#5f7a8a", "#b0578d")
STYLE = """
.chart { font: 12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
.chart text { fill: #5f5c55; } .chart .title { fill: #1d1c1a; font-size: 14px; font-weight: 600; }
.chart .grid { stroke: #e4e1da; } .chart .edge { stroke: #b5b1a7; }
@media (prefers-color-scheme: dark) { .chart text { fill: #a5a29a; } .chart .title { fill: #efede8; }
  .chart .grid { stroke: #2d2d31; } .chart .edge { stroke: #5c5a55; } }
"""


@dataclass(frozen=True)
class Line:
    """A line of points (x, y).

    Attributes:
        name: the name in the legend.
        points: the points, in order.
        faint: a thin line without a legend entry, in the color of the line with the same name.
        dashed: a dashed line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dashed: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    y_max: float | None = None,
) -> str:
    """Render an <svg> element.

    Points that are not finite, or not positive on a logarithmic axis, are left out.

    Args:
        title: the heading, wrapped to the width of the plot.
        lines: the lines, in the order of the legend.
        x_label: below the x axis, wrapped.
        y_label: along the y axis.
        log_x: a logarithmic x axis.
        log_y: a logarithmic y axis.
        y_max: the largest possible value of y, such as 1 for a recall. The y axis does not extend beyond it.
    """
    shown = [Line(line.name, _finite(line.points, log_x, log_y), line.faint, line.dashed) for line in lines]
    shown = [line for line in shown if line.points]
    names = list(dict.fromkeys(line.name for line in shown))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    titles, x_labels = _wrap(title, 1.1 * LETTER), _wrap(x_label, LETTER)
    above = ROW * (len(titles) - 1)
    legend, rows = _legend({line.name: line for line in shown if not line.faint}, colors, 38 + above)
    top = 40 + above + ROW * rows
    floor = HEIGHT - BOTTOM + above + ROW * max(0, rows - 1)  # y of the x axis
    height = floor + BOTTOM + ROW * (len(x_labels) - 1)
    x = _Axis.over([point[0] for line in shown for point in line.points], log_x, LEFT, WIDTH - RIGHT)
    y = _Axis.over([point[1] for line in shown for point in line.points], log_y, floor, top, y_max)
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>',
        *(f'<text class="title" x="{LEFT}" y="{20 + ROW * n}">{escape(text)}</text>' for n, text in enumerate(titles)),
        *legend,
    ]
    for value in y.ticks():
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.at(value):.1f}" y2="{y.at(value):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y.at(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in _without_overlap(_few_counts(shown) or x.ticks(), x):
        parts.append(f'<text x="{x.at(value):.1f}" y="{floor + 18}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<line class="edge" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    center, middle = (LEFT + WIDTH - RIGHT) / 2, (top + floor) / 2
    for n, text in enumerate(x_labels):
        parts.append(f'<text x="{center}" y="{floor + 38 + ROW * n}" text-anchor="middle">{escape(text)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    for line in sorted(shown, key=lambda line: not line.faint):
        parts.append(_polyline(line, colors[line.name], x, y))
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """A scale from values, [low, high], to pixels."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], log: bool, start: float, end: float, limit: float | None = None) -> _Axis:
        """An axis with some room around the values, which does not extend beyond `limit`."""
        low, high = min(values := list(values), default=0.0 if not log else 1.0), max(values, default=1.0)
        if log:
            room = (high / low) ** 0.05 if high > low else 2.0
            return cls(low / room, _capped(high * room, limit), log, start, end)
        room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
        return cls(0.0 if 0 <= low < 0.3 * high else low - room, _capped(high + room, limit), log, start, end)

    def at(self, value: float) -> float:
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _capped(value: float, limit: float | None) -> float:
    return value if limit is None else min(value, limit)


def _wrap(text: str, letter: float) -> list[str]:
    """Wrap a text to the width of the plot."""
    return textwrap.wrap(text, int((WIDTH - LEFT - RIGHT) / letter)) or [""]


def _without_overlap(ticks: Sequence[float], axis: _Axis) -> list[float]:
    """Drop the ticks of a horizontal axis whose labels would overlap, from left to right."""
    shown: list[float] = []
    free = -math.inf
    for value in ticks:
        half = LETTER * (len(_number(value)) + 1) / 2
        if axis.at(value) - half >= free:
            shown.append(value)
            free = axis.at(value) + half
    return shown


def _few_counts(lines: Sequence[Line]) -> list[float]:
    """The x values of all points if they are at most 8 whole numbers, such as batch sizes; otherwise none."""
    places = sorted({point[0] for line in lines for point in line.points})
    return places if len(places) <= 8 and all(place.is_integer() for place in places) else []


def _linear_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
    return ticks or _linear_ticks(low, high)


def _number(value: float) -> str:
    """Format a value with at most four digits: 12000 is 12k, 0.00012 is 1.2e-4."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.4g}"


def _finite(points: Sequence[tuple[float, float]], log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _legend(lines: dict[str, Line], colors: dict[str, str], top: int) -> tuple[list[str], int]:
    """The legend as SVG elements, from `top` downward, and its number of rows."""
    if len(lines) < 2:
        return [], 0
    parts, x, row = [], LEFT, 0
    for name, line in lines.items():
        wide = 30 + round(LETTER * len(name))
        if x + wide > WIDTH - RIGHT and x > LEFT:
            x, row = LEFT, row + 1
        y = top + ROW * row
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        parts.append(
            f'<line x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}" stroke="{colors[name]}" stroke-width="2.5"{dash}/>'
        )
        parts.append(f'<text x="{x + 22}" y="{y + 4}">{escape(name)}</text>')
        x += wide + 10
    return parts, row + 1


def _polyline(line: Line, color: str, x: _Axis, y: _Axis) -> str:
    places = [(x.at(a), y.at(b)) for a, b in line.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    strength = 'stroke-width="1" opacity="0.3"' if line.faint else 'stroke-width="2.2"'
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    element = f'<polyline fill="none" stroke="{color}" stroke-linejoin="round" {strength}{dash} points="{path}"/>'
    if line.faint or len(places) > MARKED:
        return element
    return element + "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{color}"><title>{escape(line.name)}: '
        f"{_number(vx)}, {vy:.4g}</title></circle>"
        for (a, b), (vx, vy) in zip(places, line.points, strict=True)
    )
