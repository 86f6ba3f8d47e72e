"""Operations of a catalog on a disk that is too small, in a child process: a full disk can end it by SIGBUS.

    results = run_trials("index", assets, disk, [0, 33 << 20])

A test mounts the disk with `small_disk`, which needs root and Linux, and prepares the assets once with `make_assets`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

OPERATIONS = ("index", "add", "delete", "optimize", "reindex", "restore", "export")
ITEMS = 96
LARGE = 1 << 30  # bytes, of a disk that is not full; the memory is only taken as it is filled


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    return sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"]).returncode == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs; `leave` sets its size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk: Path, free: int | None) -> None:
    """Resize a disk so that this number of bytes is free on it; None for many."""
    usage = shutil.disk_usage(disk)
    size = LARGE if free is None else usage.used + free
    subprocess.run(["mount", "-o", f"remount,size={max(size, 4096)}", str(disk)], check=True)


def make_assets(folder: Path) -> Path:
    """Write a dataset, two bundles, a catalog of all items and its archive into a folder."""
    from PIL import Image
    from support.toy_bundle import make_toy_bundle

    from unidiff_sdk import Catalog

    rng, images = np.random.default_rng(0), folder / "images"
    images.mkdir(parents=True)
    rows = []
    for k in range(ITEMS):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(images / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"item {k} {'long ' * 200}", "id": k, "price": k}))
    (images / "metadata.jsonl").write_text("\n".join(rows))
    make_toy_bundle(folder / "a")
    make_toy_bundle(folder / "b", seed=1)
    with Catalog(folder / "shop", folder / "a") as catalog:
        catalog.add_folder(images)
        catalog.count({"price": {"gt": 3}})  # creates a payload index
        catalog.export(folder / "shop.parquet")
    return folder


def run_trials(operation: str, assets: Path, disk: Path, free: Sequence[int]) -> list[dict[str, Any]]:
    """Try an operation with each number of free bytes.

    Returns one dictionary for each number: `free`, the `error` message or None, and the `items` that the operation left
    in the catalog. Raises AssertionError with the output of the child process unless all invariants held: the operation
    succeeded or raised StoreError, the catalog could still be searched and, with free space again, be opened and used.
    """
    run = subprocess.run(
        [sys.executable, __file__, operation, str(assets), str(disk), *map(str, free)], capture_output=True, text=True
    )
    assert run.returncode == 0, f"{operation}: exit code {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-4000:]}"
    return [json.loads(line) for line in run.stdout.splitlines()]


# ------------------------------------------------------------------------------------------------ the child process


def _try(operation: str, assets: Path, disk: Path, free: int) -> dict[str, Any]:
    from unidiff_sdk import Catalog, StoreError

    shop, restored, archive = disk / "shop", disk / "restored", disk / "shop.parquet"
    if operation not in ("index", "restore"):
        shutil.copytree(assets / "shop", shop)
        _reference_bundle(shop, assets)

    def act(catalog: Catalog | None) -> None:
        if operation == "index":
            with Catalog(shop, assets / "a") as opened:
                opened.add_folder(assets / "images")
        elif operation == "restore":
            Catalog.restore(assets / "shop.parquet", restored, assets / "a").close()
        else:
            assert catalog is not None
            actions: dict[str, Callable[[], object]] = {
                "add": lambda: catalog.add(
                    sorted((assets / "images").glob("*.png")), ids=[f"new {k}" for k in range(ITEMS)]
                ),
                "delete": lambda: catalog.delete(list(range(0, ITEMS, 2))),
                "optimize": catalog.optimize,
                "reindex": lambda: catalog.reindex(assets / "b"),
                "export": lambda: catalog.export(archive),
            }
            actions[operation]()

    def attempt(catalog: Catalog | None) -> str | None:
        try:
            act(catalog)
        except StoreError as error:
            assert not isinstance(error.__cause__, SystemError)
            return str(error)
        return None

    if operation in ("index", "restore"):
        leave(disk, free)
        error, items = attempt(None), 0
        if operation == "restore":
            assert restored.exists() == (error is None)
            assert not list(disk.glob(".*")), "leftovers"
        leave(disk, None)
        if (shop / "catalog.json").exists():
            with Catalog(shop, create=False) as opened:
                items = _check(opened)
        if error is not None:
            assert attempt(None) is None
        with Catalog(shop if operation == "index" else restored, create=False) as opened:
            assert _check(opened) == ITEMS
        return {"free": free, "error": error, "items": items}

    with Catalog(shop, create=False) as catalog:
        _check(catalog)
        leave(disk, free)
        error = attempt(catalog)
        items = _check(catalog)  # while the disk is full
    leave(disk, None)
    with Catalog(shop, create=False) as catalog:
        assert _check(catalog) == items
        if error is not None:
            assert attempt(catalog) is None
        expected = {"add": 2 * ITEMS, "delete": ITEMS // 2}.get(operation, ITEMS)
        assert _check(catalog) == expected
        assert catalog.info()["bundle"]["path"] == str(assets / ("b" if operation == "reindex" else "a"))
    return {"free": free, "error": error, "items": items}


def _reference_bundle(shop: Path, assets: Path) -> None:
    """Make the reference of a copied catalog to its bundle absolute."""
    file = shop / "catalog.json"
    content = json.loads(file.read_text())
    content["bundle"]["path"] = str(assets / "a")
    file.write_text(json.dumps(content))


def _check(catalog: Any) -> int:
    """Check that all items can be found with their images. Returns their number."""
    vector = np.ones(catalog.info()["bundle"]["dim"])
    hits = list(catalog.search(vector=vector, limit=10_000))
    assert len(hits) == catalog.count()
    for hit in hits:
        assert hit.load_image().size == (64, 64)
    return len(hits)


def _main(operation: str, assets: str, disk: str, *free: str) -> None:
    for number in free:
        leave(Path(disk), None)
        for left in Path(disk).iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        print(json.dumps(_try(operation, Path(assets), Path(disk), int(number))), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _main(*sys.argv[1:])
