"""Everything that a catalog writes follows the umask of the process."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from support.modes import modes_below, umask

from unidiff_sdk import Catalog
from unidiff_sdk.cli.main import main
from unidiff_sdk.datasets.synthetic import write_catalog


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_catalog_archive_images_and_datasets_follow_the_umask(tmp_path: Path, toy: Path, mask: int) -> None:
    root = tmp_path / "root"
    with umask(mask):
        write_catalog("fashion-man", root / "products", n=3)
        with Catalog(root / "shop.catalog", toy) as catalog:
            catalog.add_folder(root / "products")
            catalog.add(Image.new("RGB", (20, 20)), "red", "red", {"catalog": "fashion-man"})
            catalog.search("red")
            next(iter(catalog.search("red"))).thumbnail()
            catalog.optimize()
            catalog.export(root / "shop.parquet")
        Catalog.restore(root / "shop.parquet", root / "again.catalog", toy).close()
        arguments = ["generate", "red", "--bundle", str(toy), "--steps", "1", "-o", str(root / "images")]
        assert CliRunner().invoke(main, arguments).exit_code == 0
    files, folders = modes_below(root)
    assert files == {0o666 & ~mask} and folders == {0o777 & ~mask}
