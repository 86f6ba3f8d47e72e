"""The image store: files by content hash, thumbnails and URIs."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk.errors import ImageError, StoreError
from unidiff_sdk.store.images import THUMBNAIL_SIZE, ImageStore, ItemImage


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG under the name of a PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    path = tmp_path / "photos" / "größe 1.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, "JPEG")
    return path


def test_copy_is_stored_under_its_hash_byte_for_byte(tmp_path: Path, photo: Path) -> None:
    store = ImageStore(tmp_path / "shop")
    sha256 = hashlib.sha256(photo.read_bytes()).hexdigest()
    uri = store.add(ItemImage(photo))
    assert uri == f"images/{sha256[:2]}/{sha256}.jpg"
    assert store.path(uri).read_bytes() == photo.read_bytes()
    assert store.add(ItemImage(photo.read_bytes())) == uri
    assert len(list((tmp_path / "shop" / "images").rglob("*.*"))) == 1


def test_equal_pixels_have_one_hash(tmp_path: Path) -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    image = ItemImage(array)
    assert image.sha256 == ItemImage(Image.fromarray(array)).sha256 != ItemImage(array.reshape(6, 4, 3)).sha256
    store = ImageStore(tmp_path)
    assert store.load(store.add(image)).tobytes() == array.tobytes()


def test_reference_follows_a_move_of_both_folders(tmp_path: Path, photo: Path) -> None:
    store = ImageStore(tmp_path / "shop")
    uri = store.add(ItemImage(photo), copy=False)
    assert not (tmp_path / "shop" / "images").exists()
    shutil.copytree(tmp_path, tmp_path.parent / "moved")
    moved = ImageStore(tmp_path.parent / "moved" / "shop", references=tmp_path.parent / "moved" / "photos")
    assert moved.path(uri) == tmp_path.parent / "moved" / "photos" / photo.name
    assert moved.path(uri).is_file()


def test_reference_elsewhere_is_a_file_uri(tmp_path: Path, photo: Path) -> None:
    store = ImageStore(tmp_path / "a" / "shop")
    uri = store.add(ItemImage(photo), copy=False)
    assert uri.startswith("file:///") and store.path(uri) == photo


def test_missing_thumbnail_is_made_again(tmp_path: Path, photo: Path) -> None:
    store = ImageStore(tmp_path / "shop")
    image = ItemImage(photo)
    uri = store.add(image)
    (file,) = (tmp_path / "shop" / "thumbnails").rglob("*.webp")
    content = file.read_bytes()
    assert Image.open(io.BytesIO(content)).size == (round(THUMBNAIL_SIZE * 200 / 300), THUMBNAIL_SIZE)
    for damage in (file.unlink, lambda: file.write_bytes(b"")):
        damage()
        assert store.thumbnail(image.sha256, uri) == content


def test_remove_deletes_a_copy_but_not_a_referenced_file(tmp_path: Path, photo: Path) -> None:
    store = ImageStore(tmp_path / "shop")
    image = ItemImage(photo)
    store.remove(image.sha256, store.add(image))
    store.remove(image.sha256, store.add(image, copy=False))
    assert photo.is_file() and not [path for path in (tmp_path / "shop").rglob("*") if path.is_file()]


def test_file_that_changes_after_hashing_is_refused(tmp_path: Path, photo: Path) -> None:
    image = ItemImage(photo)
    image.release()
    Image.new("RGB", (5, 5)).save(photo)
    with pytest.raises(ImageError, match="changed while it was being added"):
        ImageStore(tmp_path / "shop").add(image)


# ------------------------------------------------------------------------------------------------ foreign payloads


@pytest.mark.parametrize(
    "uri", ["images/../../victim.png", "../victim.png", "{}", "victim", "images/aa/../../../victim.png"]
)
def test_foreign_uri_is_neither_read_nor_deleted(tmp_path: Path, uri: str) -> None:
    victim = tmp_path / "victim.png"
    Image.new("RGB", (4, 4)).save(victim)
    store = ImageStore(tmp_path / "shop")
    sha256 = ItemImage(victim).sha256
    uri = uri.format(victim.as_uri())
    if uri == "victim":
        store.add(ItemImage(victim.read_bytes()))
        (tmp_path / "shop" / "victim").symlink_to(victim)
    with pytest.raises(ImageError, match=r"references=FOLDER|symbolic link"):
        store.load(uri)
    store.remove(sha256, uri)
    store.remove("../../victim", uri)
    assert victim.is_file()


def test_foreign_hash_is_refused(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "shop")
    (tmp_path / "secret.webp").write_bytes(b"secret")
    with pytest.raises(ImageError, match="not the hash of an image"):
        store.thumbnail("../../secret", "images/aa/aa.png")


@pytest.mark.parametrize("folder", ["images", "thumbnails"])
def test_linked_folder_is_neither_written_nor_deleted_in(tmp_path: Path, photo: Path, folder: str) -> None:
    store = ImageStore(tmp_path / "shop")
    image = ItemImage(photo)
    uri = store.add(image)
    (tmp_path / "shop" / folder).rename(tmp_path / "elsewhere")
    (tmp_path / "shop" / folder).symlink_to(tmp_path / "elsewhere")
    count = len(list((tmp_path / "elsewhere").rglob("*.*")))
    for act in (lambda: store.remove(image.sha256, uri), lambda: store.add(ItemImage(np.zeros((3, 3, 3), np.uint8)))):
        with pytest.raises((ImageError, StoreError), match="symbolic link"):
            act()
    assert len(list((tmp_path / "elsewhere").rglob("*.*"))) == count


def test_reference_is_read_only_below_the_named_folder(tmp_path: Path, photo: Path) -> None:
    uri = ImageStore(tmp_path / "shop").add(ItemImage(photo), copy=False)
    for folder in (None, tmp_path / "shop", tmp_path / "phot"):
        with pytest.raises(ImageError, match="leads out of the catalog"):
            ImageStore(tmp_path / "shop", folder).path(uri)
    assert ImageStore(tmp_path / "shop", photo.parent).path(uri) == photo
    store = ImageStore(tmp_path / "shop")
    store.expected_uri(ItemImage(photo), uri, copy=False)  # the caller adds the file again
    assert store.path(uri) == photo
