"""A path of the wrong kind: the error says what it is and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from unidiff_sdk import Bundle, BundleError, Catalog, DataError, StoreError, UniDiffError
from unidiff_sdk.cli.main import main
from unidiff_sdk.datasets.reader import read_catalog
from unidiff_sdk.datasets.synthetic import write_catalog

CHECKPOINT = Path(__import__("unidiff_sdk").__file__).parent / "training" / "recipes" / "tiny_checkpoint"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """A folder with one of each: products, shop.catalog, bundle, checkpoint."""
    root = tmp_path_factory.mktemp("root")
    write_catalog("fashion-man", root / "products", n=2)
    with Catalog(root / "shop.catalog", toy) as catalog:
        catalog.add_folder(root / "products")
    shutil.copytree(toy, root / "bundle")
    (root / "checkpoint").symlink_to(CHECKPOINT)
    return root


KINDS = {
    "products": "It is a dataset, for: unidiff index",
    "shop.catalog": "It is a catalog, for: unidiff search",
    "bundle": "It is a bundle, for: unidiff index FOLDER CATALOG --bundle",
    "checkpoint": "It is a training checkpoint, for: unidiff-export",
}


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_each_kind_given_for_each_other_is_named(root: Path, given: str, wanted: str) -> None:
    opens: dict[str, tuple[type[UniDiffError], Callable[[Path], object]]] = {
        "products": (DataError, lambda path: next(read_catalog(path, captions=False))),
        "shop.catalog": (StoreError, Catalog),
        "bundle": (BundleError, Bundle.open),
        "checkpoint": (UniDiffError, open_checkpoint),
    }
    error, open_path = opens[wanted]
    if given == wanted:
        open_path(root / given)
        return
    with pytest.raises(error) as caught:
        open_path(root / given)
    assert KINDS[given] in str(caught.value) and str(root / given) in str(caught.value)


def open_checkpoint(path: Path) -> object:
    pytest.importorskip("torch", reason="needs the train extra")
    from unidiff_sdk.training.checkpoints.bases import load_base

    return load_base(path)


def test_swapped_arguments_are_named(root: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code in (1, 2)
        return result.stderr

    assert "Swap them: unidiff search CATALOG TEXT" in run("search", "red shirt", root / "shop.catalog")
    assert "is a catalog, not a prompt" in run("generate", "red shirt", root / "shop.catalog", "-o", root / "out")
    assert "is a folder" in run("restore", root / "shop.catalog", root / "new.catalog")
    assert "It is a dataset" in run("export", root / "products", root / "x.parquet")


def test_foreign_files_of_the_same_name_do_not_hide_a_dataset(tmp_path: Path) -> None:
    write_catalog("fashion-man", tmp_path / "data" / "train", n=2)
    (tmp_path / "data" / "manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / "data" / "catalog.json").write_text("[]")
    assert len(list(read_catalog(tmp_path / "data"))) == 2


def test_variants_of_weights_are_named(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    from unidiff_sdk.training.checkpoints.bases import load_base

    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "half"))
    (folder / "clip" / "model.safetensors").rename(folder / "clip" / "model.fp16.safetensors")
    with pytest.warns(UserWarning, match=r"clip has no main weight files\. Its only variant fp16 is loaded"):
        load_base(folder)
    shutil.copy(folder / "clip" / "model.fp16.safetensors", folder / "clip" / "model.bf16.safetensors")
    with pytest.raises(UniDiffError, match=r"clip has its weights only as variants: bf16, fp16\. "):
        load_base(folder)
