"""Webdataset shards: samples become rows, and invalid or damaged shards are reported."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.reader import InvalidRow, count_rows, read_catalog
from unidiff_sdk.datasets.shards import Member, read_shards
from unidiff_sdk.errors import DataError


def image_bytes(color: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes | str], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


GOOD = {
    "0001.png": image_bytes("red"),
    "0001.txt": "a red dress\n",
    "0001.json": json.dumps({"price": 10, "brand": None, "text": "not this"}),
    "sub/0002.JPG": image_bytes("blue", "JPEG"),
    "sub/0002.json": json.dumps({"caption": "blue boots", "price": 12.5}),
}


def test_samples_become_rows(tmp_path: Path) -> None:
    write_shard(tmp_path / "shop-000.tar", GOOD)
    write_shard(tmp_path / "shop-001.tar", {"0003.webp": image_bytes("green", "WEBP"), "0003.txt": "a green mug"})
    rows = list(read_catalog(tmp_path, strict=True))
    assert [(row.text, row.payload, row.line) for row in rows] == [
        ("a red dress", {"price": 10}, 1),
        ("blue boots", {"price": 12.5}, 2),
        ("a green mug", {}, 3),
    ]
    assert rows[0].image() == GOOD["0001.png"] and rows[1].name == "sub/0002.JPG"
    assert count_rows(tmp_path) == 3 and count_rows(tmp_path / "shop-000.tar") == 2
    assert [row.text for row in read_catalog(tmp_path / "shop-001.tar")] == ["a green mug"]


def test_metadata_table_takes_precedence_over_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "shop.tar", GOOD)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}', encoding="utf-8")
    assert list(read_catalog(tmp_path)) == [] and count_rows(tmp_path) == 1


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.txt": "no image"}, "0 images instead of one (txt)"),
        (
            {"a.png": image_bytes(), "a.jpg": image_bytes(kind="JPEG"), "a.txt": "two"},
            "2 images instead of one (jpg, png, txt)",
        ),
        ({"a.png": image_bytes()}, "the caption is missing"),
        ({"a.png": image_bytes(), "a.txt": "  \n"}, "the caption is missing"),
        ({"a.png": image_bytes(), "a.json": '{"text": 7}'}, "the caption is missing"),
        ({"a.png": image_bytes(), "a.txt": b"\xff\xfe"}, "not UTF-8"),
        ({"a.png": image_bytes(), "a.json": "{"}, "not valid JSON"),
        ({"a.png": image_bytes(), "a.json": "[" * 100_000}, "not valid JSON"),
        ({"a.png": image_bytes(), "a.json": "[1]"}, "not a JSON object"),
        ({"a.png": image_bytes(), "a.txt": "x" * 2_000_000}, "at most 1,048,576 are allowed"),
    ],
)
def test_invalid_samples_are_reported(tmp_path: Path, members: dict[str, bytes | str], reason: str) -> None:
    write_shard(
        tmp_path / "s.tar", {"0.png": image_bytes(), "0.txt": "first", **members, "z.png": image_bytes(), "z.txt": "z"}
    )
    invalid: list[InvalidRow] = []
    assert [row.text for row in read_catalog(tmp_path, on_error=invalid.append)] == ["first", "z"]
    assert [(row.line, row.file_name) for row in invalid] == [(2, "s.tar/a")] and reason in invalid[0].reason
    with pytest.raises(DataError, match=r"line 2 \(s\.tar/a\)"):
        list(read_catalog(tmp_path, strict=True))


def test_other_files_and_links_are_ignored(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/hostname"
            tar.addfile(header)
        for name in ("README", ".hidden", "c.png", "c.cls", "c.txt"):
            data = image_bytes() if name == "c.png" else b"text"
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    (row,) = read_catalog(tmp_path, strict=True)
    assert (row.name, row.text) == ("c.png", "text")


def test_truncated_shard_gives_the_samples_before(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "s.tar", GOOD).read_bytes()
    second = next(sample.image for sample in read_shards([tmp_path / "s.tar"]) if "0002" in sample.name)
    assert second is not None
    (tmp_path / "s.tar").write_bytes(whole[: second.offset + 10])
    write_shard(tmp_path / "t.tar", {"0003.png": image_bytes(), "0003.txt": "a green mug"})
    invalid: list[InvalidRow] = []
    texts = [row.text for row in read_catalog(tmp_path, on_error=invalid.append)]
    assert texts == ["a red dress", "a green mug"], "the next shard is read"
    assert any("the shard is damaged" in row.reason for row in invalid)


def test_damage_in_the_middle_of_a_shard_is_reported(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", GOOD)
    content = bytearray(shard.read_bytes())
    place = next(sample.image for sample in read_shards([shard]) if "0002" in sample.name)
    assert place is not None
    content[place.offset - tarfile.BLOCKSIZE : place.offset] = b"\x7f" * tarfile.BLOCKSIZE
    shard.write_bytes(content)
    invalid: list[InvalidRow] = []
    assert len(list(read_catalog(tmp_path, on_error=invalid.append))) == 1
    assert "no header at byte" in invalid[-1].reason


@pytest.mark.parametrize("content", [b"", b"not a tar file " * 100])
def test_file_that_is_not_a_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        list(read_catalog(tmp_path))


def test_compressed_shard_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="decompress"):
        list(read_catalog(tmp_path))


def test_shard_that_changed_is_an_error(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", GOOD)
    row = next(read_catalog(tmp_path))
    shard.write_bytes(b"short")
    with pytest.raises(DataError, match=r"no longer contains 0001\.png"):
        row.image()
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        row.image()


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.text(st.sampled_from("ab/é 1"), min_size=1, max_size=120), min_size=1, max_size=4, unique=True),
    tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_image_is_read_at_its_offset(tmp_path_factory: Any, names: list[str], tar_format: int) -> None:
    """Long and non-ASCII names need extra headers, which differ between the formats of tar."""
    names = [f"{name.strip('/') or 'x'}{number}" for number, name in enumerate(names)]
    content = {name: image_bytes(["red", "blue", "green", "pink"][number]) for number, name in enumerate(names)}
    path = tmp_path_factory.mktemp("shard") / "s.tar"
    try:
        write_shard(path, {f"{name}.png": data for name, data in content.items()}, format=tar_format)
    except ValueError:  # ustar cannot hold every name
        return
    places = [sample.image for sample in read_shards([path])]
    assert {place.name.removesuffix(".png"): place.read() for place in places if isinstance(place, Member)} == content


def test_catalog_adds_a_folder_of_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", GOOD | {"9.png": b"no image", "9.txt": "broken"})
    with Catalog() as catalog:
        report = catalog.add_folder(tmp_path, copy=False)
        assert (report.added, report.skipped) == (2, 0)
        assert [(bad.line, bad.file_name) for bad in report.failed] == [(3, "9.png")]
        hit = catalog.search("a red dress", limit=1)[0]
        assert hit.load_image().size == (8, 8), "images in shards are always copied"
        assert catalog.add_folder(tmp_path).skipped == 2


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_header_that_claims_64_gb_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("9.png")
    header.type, header.size = kind, 64 << 30
    whole = write_shard(tmp_path / "s.tar", GOOD).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "s.tar").write_bytes(whole[:end] + header.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048)
    invalid: list[InvalidRow] = []
    rows = list(read_catalog(tmp_path, on_error=invalid.append))
    assert [row.text for row in rows[:2]] == ["a red dress", "blue boots"]
    assert invalid
    for row in rows[2:]:
        with pytest.raises(DataError):
            row.image()


def test_an_image_that_claims_64_gb_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="at most 268,435,456 are allowed"):
        Member(tmp_path / "s.tar", "0.png", 0, 64 << 30).read()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_shard_gives_rows_or_a_data_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(write_shard(tmp_path / "s.tar", GOOD).read_bytes()[:4096])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "s.tar").write_bytes(content)
    with contextlib.suppress(DataError):
        for row in read_catalog(tmp_path, on_error=lambda row: None):
            row.image()
