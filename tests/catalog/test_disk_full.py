"""A catalog on a full disk: an error says what is needed, nothing stored is lost, and the catalog remains usable."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.disk_full import can_mount, make_assets, run_trials, small_disk
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, StoreError
from unidiff_sdk._internal import memory
from unidiff_sdk._internal.memory import require_free_space
from unidiff_sdk.catalog.snapshot import OPTIMIZE_FROM
from unidiff_sdk.store.edge.optimizer import optimize_in_subprocess
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.images import ImageStore

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk_and_assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    if not can_mount():
        pytest.skip("mounting a small disk needs root on Linux")
    folder = tmp_path_factory.mktemp("disk full")
    assets = make_assets(folder / "assets")
    with small_disk(folder / "disk") as disk:
        yield disk, assets


@pytest.mark.parametrize(
    ("operation", "failing", "passing"),
    [
        ("index", [1 * MIB, int(32.5 * MIB), 34 * MIB], 40 * MIB),
        ("add", [0, 10 * MIB], 40 * MIB),
        ("delete", [0], 8 * MIB),
        ("optimize", [34 * MIB], 250 * MIB),
        ("reindex", [10 * MIB], 40 * MIB),
        ("restore", [1 * MIB, 34 * MIB], 40 * MIB),
        ("export", [0, 10 * MIB], 40 * MIB),
    ],
)
def test_operation_on_a_full_disk_fails_without_loss(
    disk_and_assets: tuple[Path, Path], operation: str, failing: list[int], passing: int
) -> None:
    """`run_trials` checks that the process survives and that the catalog keeps its items."""
    disk, assets = disk_and_assets
    *failed, passed = run_trials(operation, assets, disk, [*failing, passing])
    assert passed["error"] is None
    for trial in failed:
        assert any(text in trial["error"] for text in ("needs", "No space left")), trial
        assert str(disk) in trial["error"], trial


def fill(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Report this number of free bytes on every disk."""
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))


def test_error_of_a_full_disk_says_how_much_is_needed_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, 33 * MIB)
    require_free_space(tmp_path / "not there yet", 1 * MIB, "a write")
    with pytest.raises(StoreError, match=rf"a write needs 34.0 MiB .* {tmp_path} has 33.0 MiB\. Nothing"):
        require_free_space(tmp_path, 2 * MIB, "a write")


def test_image_leaves_the_reserve_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unidiff_sdk.store.images import ItemImage

    fill(monkeypatch, memory.RESERVE)
    with pytest.raises(StoreError, match=r"the image .* needs"):
        ImageStore(tmp_path).add(ItemImage(np.zeros((8, 8, 3), np.uint8)))
    assert not list(tmp_path.rglob("*.*"))


def test_delete_succeeds_where_the_images_cannot_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle")) as catalog:
        catalog.add([np.full((8, 8, 3), k, np.uint8) for k in range(2)], ids=[1, 2])
        fill(monkeypatch, 5 * MIB)
        with pytest.warns(UserWarning, match="images that they no longer use were not deleted"):
            assert catalog.delete(1) == 1
        assert catalog.count() == 1


def test_items_are_kept_where_the_search_index_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("file_name,text\na.png,black\n")
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle")) as catalog:
        monkeypatch.setattr(EdgeStore, "unindexed_count", lambda store: OPTIMIZE_FROM)
        fill(monkeypatch, 100 * MIB)
        with pytest.warns(UserWarning, match="index was not built. Call optimize.. later. The disk is too full"):
            assert catalog.add_table(tmp_path / "table.csv").added == 1
        assert catalog.count() == 1


def test_optimizer_that_ends_by_sigbus_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], -signal.SIGBUS, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(StoreError, match="was not built: the disk is full"):
        optimize_in_subprocess(tmp_path / "0")
