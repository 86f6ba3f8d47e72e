"""Local copies of shards in object storage."""

from __future__ import annotations

import io
import shutil
import tarfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from unidiff_sdk import DataError
from unidiff_sdk.datasets.reader import read_catalog
from unidiff_sdk.scale.copies import copy_shards
from unidiff_sdk.store.images.object_storage import ObjectFolder


def shard(rows: int, shade: int = 0) -> bytes:
    image, buffer = io.BytesIO(), io.BytesIO()
    Image.new("L", (4, 4), shade).save(image, "BMP")  # of one size for all shades
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(rows):
            for suffix, content in ((".bmp", image.getvalue()), (".txt", f"item {number}".encode())):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def stored() -> str:
    """The URL of two shards, with 3 and 5 rows."""
    files, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/products"
    files.pipe({f"{root}/a/0.tar": shard(3), f"{root}/b/1.tar": shard(5), f"{root}/readme.md": b"text"})
    return f"memory:/{root}"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from object storage."""
    names: list[str] = []
    copy = ObjectFolder.copy
    monkeypatch.setattr(ObjectFolder, "copy", lambda self, name, path: (names.append(name), copy(self, name, path))[1])
    return names


def in_memory(url: str, name: str) -> str:
    return f"{url.removeprefix('memory:/')}/{name}"


def test_each_shard_is_copied_once(stored: str, reads: list[str], tmp_path: Path) -> None:
    """Also if several callers start at once, in a folder that does not exist yet."""
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: copy_shards(stored, tmp_path / "new" / "folder"), range(4)))
    (place,) = places
    assert place.name == "products" and place.is_relative_to(tmp_path / "new" / "folder")
    assert sorted(reads) == ["a/0.tar", "b/1.tar"]
    assert [row.text for row in read_catalog(place)] == [f"item {n}" for n in (0, 1, 2, 0, 1, 2, 3, 4)]
    assert copy_shards(f"{stored}/", tmp_path / "new" / "folder") == place and len(reads) == 2


def test_one_shard_is_a_dataset(stored: str, reads: list[str], tmp_path: Path) -> None:
    copy_shards(stored, tmp_path)
    place = copy_shards(f"{stored}/b/1.tar", tmp_path)
    assert reads[2:] == ["1.tar"] and place.name == "1" and len(list(read_catalog(place))) == 5


def test_changed_and_damaged_shards_are_copied_again(stored: str, reads: list[str], tmp_path: Path) -> None:
    place = copy_shards(stored, tmp_path)
    (place / "b/1.tar").write_bytes(b"cut short")
    (place / f".{'0' * 16}.part").write_bytes(b"left by a killed process")
    changed = shard(3, shade=9)
    assert len(changed) == len(shard(3))
    fsspec.filesystem("memory").pipe_file(in_memory(stored, "a/0.tar"), changed)
    reads.clear()
    copy_shards(stored, tmp_path)
    assert sorted(reads) == ["a/0.tar", "b/1.tar"]
    assert (place / "b/1.tar").read_bytes() == shard(5) and (place / "a/0.tar").read_bytes() == changed


def test_copies_never_mix_with_other_files(stored: str, tmp_path: Path) -> None:
    copy_shards(stored, tmp_path)
    fsspec.filesystem("memory").rm_file(in_memory(stored, "a/0.tar"))
    with pytest.raises(DataError, match=r"a/0\.tar is not in the dataset\. Remove it"):
        copy_shards(stored, tmp_path)


def test_images_in_files_of_their_own_are_refused(tmp_path: Path) -> None:
    files, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    files.pipe({f"{root}/a/0.png": image.getvalue(), f"{root}/b/metadata.jsonl": b"{}", f"{root}/b/0.png": b""})
    for name in ("a", "b"):
        with pytest.raises(DataError, match=r"Only \.tar and \.parquet files"):
            copy_shards(f"memory:/{root}/{name}", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_copies_need_space(stored: str, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(shard(5)) - 1))
    with pytest.raises(DataError, match="GB of free space, but"):
        copy_shards(stored, tmp_path)
    assert not reads


def test_folder_that_cannot_be_written(stored: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Choose another folder"):
        copy_shards(stored, tmp_path / "file")
