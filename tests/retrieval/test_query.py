"""Queries: their parts, weights and digests, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unidiff_sdk import OptionError
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.retrieval.query import Query

DIM = 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "The query is empty"),
        ({"text": ""}, "text='': give a non-empty string"),
        ({"without": ["stripes", 3]}, "without=3: give a non-empty string"),
        ({"like": []}, "The query is empty"),
        ({"like": 1.5}, "not an id"),
        ({"unlike": [""]}, "not an id"),
        ({"vector": [0.0] * DIM}, "not all zero"),
        ({"vector": [float("nan")] * DIM}, "finite numbers"),
        ({"vector": [[1.0]]}, "give one dimension of finite numbers"),
        ({"vector": "red"}, "sequence of numbers"),
        (
            {"text": "x", "weights": {"caption": 1}},
            "is not a part of a query. Parts: text, imagined, image, like, vector, unlike, without",
        ),
        ({"text": "x", "weights": {"text": -1}}, "finite number of at least 0"),
        ({"text": "x", "weights": {"text": True}}, "finite number of at least 0"),
        ({"text": "x", "weights": {"text": 0}}, "give at least one of text a weight above 0"),
        ({"text": "x", "weights": (1, 2, 3)}, "two numbers"),
        ({"text": "x", "weights": 0.5}, "two numbers"),
    ],
)
def test_query_refuses_invalid_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Query.of(**arguments)


def test_digest_identifies_a_query(tmp_path: Path) -> None:
    image = render(products("fashion-man", 1, seed=0)[0])
    image.save(tmp_path / "a.png")
    arguments_of_queries: list[dict[str, Any]] = [
        {"text": "red"},
        {"text": "blue"},
        {"without": "red"},
        {"text": "red", "image": image},
        {"text": "red", "image": tmp_path / "a.png"},
        {"text": "red", "without": "stripes", "weights": {"text": 2}},
        {"text": "red", "imagine": 2},
        {"text": "red", "imagine": 3},
        {"like": 7},
        {"like": "7"},
        {"vector": [1.0, 2.0]},
    ]
    digests = [Query.of(**arguments).digest() for arguments in arguments_of_queries]
    assert digests == [Query.of(**arguments).digest() for arguments in arguments_of_queries]
    assert len(set(digests)) == len(arguments_of_queries)
