"""Selection of candidates. The judge reads an image's red channel as its score, the green one as its similarity."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk.catalog.generating import Selection, select
from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.retrieval.results import Hit


def candidate(offset: int, values: Sequence[tuple[int, int]]) -> Image.Image:
    score, similarity = values[offset % len(values)]
    return Image.new("RGB", (2, 2), (score, similarity, 7))


def judge(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[tuple[float, Hit | None]]:
    judged: list[tuple[float, Hit | None]] = []
    for _, image in zip(prompts, images, strict=True):
        red, green, _ = (int(channel) for channel in np.asarray(image)[0, 0])
        hit = Hit("x", green / 255, None, {}, "", "", None)  # type: ignore[arg-type]
        judged.append((red / 255, hit if green else None))
    return judged


def run(values: Sequence[tuple[int, int]], prompts: Sequence[str] = ("p",), **options: Any) -> list[Selection]:
    calls: list[tuple[int, int]] = []

    def generate(prompts: Sequence[str], offset: int, count: int) -> list[Image.Image]:
        calls.append((offset, count))
        return [candidate(offset + k, values) for _ in prompts for k in range(count)]

    selections = select(prompts, generate, judge, GenerationOptions(**options))
    ends = [offset + count for offset, count in calls]
    assert [offset for offset, _ in calls] == [0, *ends[:-1]]  # no seed twice, none left out
    return selections


VALUES = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    values=VALUES,
    n=st.integers(1, 5),
    more=st.integers(0, 6),
    spare=st.integers(0, 20),
    min_score=st.none() | st.floats(0, 1),
    max_similarity=st.none() | st.floats(0, 1),
)
def test_select_accepts_the_best_candidates_that_pass(
    values: list[tuple[int, int]],
    n: int,
    more: int,
    spare: int,
    min_score: float | None,
    max_similarity: float | None,
) -> None:
    limited = min_score is not None or max_similarity is not None
    budget = n + more + (spare if limited else 0)  # nothing can be rejected without a limit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (selection,) = run(
            values,
            n=n,
            best_of=n + more,
            budget=budget,
            min_score=min_score,
            max_similarity=max_similarity,
        )
    every = [values[k % len(values)] for k in range(selection.generated)]
    passing = [
        score / 255
        for score, similarity in every
        if (min_score is None or score / 255 >= min_score)
        and (max_similarity is None or not similarity or similarity / 255 <= max_similarity)
    ]
    assert [candidate.score for candidate in selection.accepted] == sorted(passing, reverse=True)[:n]
    assert n + more <= selection.generated <= budget
    assert sum(selection.rejected.values()) == selection.generated - len(passing)
    short = len(selection.accepted) < n
    assert not short or selection.generated == budget  # never stops before the budget is spent
    assert len(caught) == short


def test_select_warns_with_the_reasons_of_a_shortage() -> None:
    with pytest.warns(UserWarning) as caught:
        run([(100, 0), (200, 250), (90, 0)], n=2, budget=6, min_score=0.5, max_similarity=0.9)
    assert str(caught[0].message) == (
        "only 0 of 2 images of 'p': of 6 generated, 4 scored below min_score=0.5 (best: 0.392), "
        "2 exceeded max_similarity=0.9; raise budget=, or relax these limits"
    )


def test_select_generates_for_each_prompt_until_it_has_enough() -> None:
    selections = run([(10, 0), (20, 0), (250, 0)], prompts=["a", "b"], n=1, min_score=0.9, budget=9)
    assert [(len(s.accepted), s.generated, s.accepted[0].offset) for s in selections] == [(1, 3, 2), (1, 3, 2)]


def test_safety_rejects_and_replaces() -> None:
    grey = Image.new("L", (2, 2), 128)

    def safety(image: Image.Image) -> Image.Image | None:
        red = int(np.asarray(image)[0, 0, 0])
        return None if red == 1 else grey if red == 2 else image

    (selection,) = run([(1, 0), (2, 0), (3, 0)], n=2, safety=safety)
    assert selection.rejected == {"safety": 1} and selection.generated == 3
    first, second = selection.accepted
    assert first.replaced and first.image.mode == "RGB" and first.score == 128 / 255 and not second.replaced
    with pytest.warns(UserWarning, match="of 4 generated, safety rejected 4"):
        run([(1, 0)], n=1, safety=safety)
    with pytest.raises(OptionError, match="safety returned True; it must return the image"):
        run([(1, 0)], n=1, safety=lambda image: True)  # type: ignore[arg-type, return-value]
