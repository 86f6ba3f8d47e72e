"""Bad arguments of bulk jobs are refused before any process starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from unidiff_sdk import Catalog, DataError, OptionError, ProviderError
from unidiff_sdk.cli.main import main
from unidiff_sdk.scale import index


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"gpus": -1}, "gpus"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 65}, "1 to 64"),
        ({"gpus": True}, "gpus"),
        ({"gpus": float("nan")}, "gpus"),
    ],
    ids=["none", "half", "negative", "no batch", "large batch", "boolean", "nan"],
)
def test_invalid_number_is_refused(
    small_catalog: Path, toy: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl", **options)
    assert not (tmp_path / "shop").exists()


def test_missing_source_creates_no_catalog(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        index(tmp_path / "none", tmp_path / "shop", toy)
    assert not (tmp_path / "shop").exists()


def test_missing_ray_is_named(small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ProviderError, match=r"unidiff-sdk\[ray\]"):
        index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")


def test_resuming_without_a_record_is_an_error(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    arguments = ["bulk", "index", small_catalog, "--to", tmp_path / "shop", "--bundle", toy, "--resume"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--record", str(tmp_path / "none.jsonl")])
    assert result.exit_code == 1 and "Run without --resume" in result.stderr


@pytest.mark.slow
def test_folder_is_indexed_as_by_one_process(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the ray extra")
    report = index(small_catalog, tmp_path / "bulk", toy, workers=2, record=tmp_path / "run.jsonl")
    with Catalog(tmp_path / "one", toy) as one, Catalog(tmp_path / "bulk") as bulk:
        assert report.added == one.add_folder(small_catalog).added == 12
        for query in ("a red dress", "teal"):
            expected = {hit.id: pytest.approx(hit.score, abs=1e-6) for hit in one.search(query, limit=12)}
            assert {hit.id: hit.score for hit in bulk.search(query, limit=12)} == expected
        assert bulk.columns() == one.columns() and not bulk.check().remaining
        assert bulk.add_folder(small_catalog, prune=True).skipped == 12, "the items are those of the folder"
