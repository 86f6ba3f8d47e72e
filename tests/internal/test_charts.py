"""Line charts: well-formed SVG with points at the right positions, for any values."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff_sdk._internal.pages.charts import Line, _Axis, line_chart

SVG = "{http://www.w3.org/2000/svg}"
numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


def rendered(*lines: Line, **options: object) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart("title", lines, x_label="x", **options))


def points_of(svg: ElementTree.Element) -> list[tuple[float, float]]:
    points = svg.find(f"{SVG}polyline").get("points").split()
    return [tuple(map(float, point.split(","))) for point in points]


@settings(max_examples=100, deadline=None)
@given(points=st.lists(st.tuples(numbers, numbers), max_size=8), log=st.booleans())
def test_chart_of_any_values_is_well_formed_svg(points: list[tuple[float, float]], log: bool) -> None:
    svg = rendered(Line("a <b> & c", points), log_x=log, log_y=log)
    text = "".join(svg.itertext())
    assert "nan" not in text and "inf" not in text


def test_points_are_in_proportion() -> None:
    (x0, y0), (x1, y1), (x2, y2) = points_of(rendered(Line("a", [(0, 0), (5, 10), (10, 40)])))
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.2) and math.isclose(y0 - y2, 4 * (y0 - y1), abs_tol=0.5)


def test_logarithmic_axis_has_equal_decades_and_omits_other_values() -> None:
    found = points_of(rendered(Line("a", [(0, 1), (1, 1), (10, 10), (100, 100), (-1, 5)]), log_x=True, log_y=True))
    assert len(found) == 3
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(found)]
    assert math.isclose(steps[0][0], steps[1][0], abs_tol=0.2) and steps[0][1] < 0


def test_few_whole_numbers_are_the_ticks_of_a_logarithmic_axis() -> None:
    batches = rendered(Line("a", [(1, 5.0), (4, 9.0), (16, 30.0)]), log_x=True)
    assert {"1", "4", "16"} <= {text.text for text in batches.iter(f"{SVG}text")}


def test_axis_ends_at_its_maximum() -> None:
    for recalls in ([1.0, 1.0], [0.2, 1.0], [0.99, 1.0]):
        svg = rendered(Line("a", [(1, recalls[0]), (2, recalls[1])]), y_max=1.0)
        labels = [float(text.text) for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
        assert max(labels) == 1
        assert points_of(svg)[1][1] == min(float(line.get("y1")) for line in svg.iter(f"{SVG}line"))


def test_long_titles_and_labels_are_wrapped_inside_the_chart() -> None:
    words = [f"word{number}" for number in range(40)]
    svg = ElementTree.fromstring(line_chart(" ".join(words), [Line("a", [(0, 1)])], x_label=" ".join(words[::-1])))
    texts = [text for text in svg.iter(f"{SVG}text") if "word" in (text.text or "")]
    assert sorted(" ".join(text.text for text in texts).split()) == sorted(2 * words)
    assert all(len(text.text) < 80 for text in texts)
    assert len({text.get("y") for text in texts}) == len(texts)
    assert max(float(text.get("y")) for text in texts) < float(svg.get("viewBox").split()[3])


@given(st.lists(st.integers(0, 20_000), min_size=2, max_size=8, unique=True), st.booleans())
def test_tick_labels_do_not_overlap(counts: list[int], log: bool) -> None:
    svg = rendered(Line("a", [(count, 1) for count in counts]), log_x=log)
    ticks = [text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "middle" and text.text != "x"]
    assert ticks
    spans = sorted((float(text.get("x")), 3.3 * len(text.text)) for text in ticks if text.text)
    assert all(right - half >= left + width for (left, width), (right, half) in pairwise(spans))


@settings(max_examples=200, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), log=st.booleans())
def test_ticks_are_few_and_within_the_axis(low: float, span: float, log: bool) -> None:
    low = abs(low) + 1e-3 if log else low
    axis = _Axis.over([low, low + span], log, 0, 100)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 16 and ticks == sorted(set(ticks))
    assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in ticks)


def test_legend_lists_each_name_once_and_is_omitted_for_a_single_line() -> None:
    points = [(0.0, 1.0), (1.0, 2.0)]
    both = rendered(Line("raw", points, faint=True), Line("raw", points), Line("other", points, dashed=True))
    assert ["".join(text.itertext()) for text in both.iter(f"{SVG}text")].count("raw") == 1
    assert "raw" not in "".join(rendered(Line("raw", points)).find(f"{SVG}text").itertext())
