"""Bulk generation: its images are those of `Catalog.generate`, and its options are checked."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk import Catalog, DataError, OptionError
from unidiff_sdk.generation.provenance import read_recipe
from unidiff_sdk.scale import generate, generating
from unidiff_sdk.scale.generating import _accepted, _prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed"),
        ({"duplicates": 1.5}, "duplicates"),
        ({"like": "a.png"}, "has no like"),
        ({"stps": 3}, "no argument 'stps'"),
        ({"n": 0}, "n is 0"),
        ({"catalog": "shop", "workers": 2}, "one process opens"),
    ],
    ids=["workers", "seed", "duplicates", "like", "typo", "n", "folder"],
)
def test_invalid_option_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red dress\n")
    with pytest.raises(OptionError, match=message):
        generate(tmp_path / "prompts.txt", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_prompts_are_read_from_text_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red\n\n blue \n")
    (tmp_path / "a.jsonl").write_text('{"text": "red"}\n{"text": ""}\n{"text": "blue"}\n')
    (tmp_path / "a.csv").write_text("text,price\nred,1\n")
    for name in ("a.txt", "a.jsonl"):
        rows = list(_prompts(tmp_path / name))
        assert [(row, prompt) for row, _, prompt, problem in rows if not problem] == [(0, "red"), (2, "blue")]
    assert [prompt for *_, prompt, _ in _prompts(tmp_path / "a.csv")] == ["red"]
    (tmp_path / "marked.txt").write_text("red\n", encoding="utf-8-sig")
    assert [prompt for *_, prompt, _ in _prompts(tmp_path / "marked.txt")] == ["red"]
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(_prompts(tmp_path / "latin.txt"))
    (tmp_path / "b.csv").write_text("prompt\nred\n")
    with pytest.raises(DataError, match="no column text"):
        list(_prompts(tmp_path / "b.csv"))
    with pytest.raises(DataError, match="no such file"):
        generate(tmp_path / "none.txt", tmp_path / "out")


def test_existing_dataset_is_kept(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red dress\n")
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match="has a dataset already"):
        generate(tmp_path / "prompts.txt", tmp_path, record=tmp_path / "run.jsonl")
    assert (tmp_path / "metadata.jsonl").read_text() == "{}"


def embedded(vectors: np.ndarray, rows: list[int]) -> list[dict[str, Any]]:
    """Images as the record of a job has them."""
    codes = (base64.b64encode(vector.tobytes()).decode() for vector in vectors)
    return [{"row": row, "vector": code} for row, code in zip(rows, codes, strict=True)]


@pytest.mark.parametrize("block", [7, 64, 1000])  # 7 and 64 divide the three images of a row
def test_duplicates_are_those_of_a_comparison_of_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "_COMPARED_IMAGES", block)
    vectors = np.random.default_rng(0).normal(size=(300, 3)).astype("<f2")
    rows = [number // 3 for number in range(300)]
    accepted = _accepted(embedded(vectors, rows), 0.98)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    kept: list[int] = []
    for number in range(300):
        if not any(unit[number] @ unit[other] >= 0.98 for other in kept if rows[other] < rows[number]):
            kept.append(number)
    assert [number for number, is_kept in enumerate(accepted) if is_kept] == kept and len(kept) < 250


def test_equal_images_are_duplicates_at_the_highest_threshold() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 64)).astype("<f2")
    assert _accepted(embedded(np.concatenate([vectors, vectors]), list(range(100))), 1) == [True] * 50 + [False] * 50


@pytest.mark.slow
def test_images_are_those_of_the_catalog_and_a_resumed_run_adds_none(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the ray extra")
    prompts = ["a red dress", "", *(f"a blue coat {number}" for number in range(8))]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    options = {"n": 2, "best_of": 3, "steps": 2}
    report = generate(
        tmp_path / "prompts.txt", tmp_path / "out", seed=5, workers=2, record=tmp_path / "run.jsonl", **options
    )
    assert (report.images, report.generated, report.duplicates) == (18, 27, 0)
    assert [(row.line, row.reason) for row in report.failed] == [(2, "the line is empty")]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows[::2]] == [prompt for prompt in prompts if prompt]
    with Catalog() as catalog:
        expected = catalog.generate(prompts[3], seed=5 + 3 * 3, **options)
        found = [row for row in rows if row["text"] == prompts[3]]
        assert [row["seed"] for row in found] == [image.seed for image in expected]
        for row, image in zip(found, expected, strict=True):
            with Image.open(tmp_path / "out" / row["file_name"]) as stored:
                difference = np.asarray(stored).astype(int) - np.asarray(image.image).astype(int)
                assert np.abs(difference).max() <= 1
            assert read_recipe(tmp_path / "out" / row["file_name"]).arguments["seed"] == image.seed
        assert catalog.add_folder(tmp_path / "out").added == 18
    before = (tmp_path / "out" / "metadata.jsonl").read_bytes()
    again = generate(
        tmp_path / "prompts.txt", tmp_path / "out", seed=5, resume=True, record=tmp_path / "run.jsonl", **options
    )
    assert again.images == 18 and (tmp_path / "out" / "metadata.jsonl").read_bytes() == before
