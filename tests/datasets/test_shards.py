"""Webdataset shards: the same rows as from a folder, whatever else lies in a tar file that anyone may have made."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.reader import InvalidRow, count_rows, read_catalog
from unidiff_sdk.datasets.shards import Member, read_shards
from unidiff_sdk.errors import DataError


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
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
    "0001.png": picture("red"),
    "0001.txt": "a red dress\n",
    "0001.json": json.dumps({"price": 10, "brand": None, "text": "not this"}),
    "sub/0002.JPG": picture("blue", "JPEG"),
    "sub/0002.json": json.dumps({"caption": "blue boots", "price": 12.5}),
}


def test_samples_become_rows(tmp_path: Path) -> None:
    write_shard(tmp_path / "shop-000.tar", GOOD)
    write_shard(tmp_path / "shop-001.tar", {"0003.webp": picture("green", "WEBP"), "0003.txt": "a green mug"})
    rows = list(read_catalog(tmp_path, strict=True))
    assert [(row.text, row.payload, row.line) for row in rows] == [
        ("a red dress", {"price": 10}, 1),
        ("blue boots", {"price": 12.5}, 2),
        ("a green mug", {}, 3),
    ]
    assert rows[0].image() == GOOD["0001.png"] and rows[1].name == "sub/0002.JPG"
    assert count_rows(tmp_path) == 3 and count_rows(tmp_path / "shop-000.tar") == 2
    assert [row.text for row in read_catalog(tmp_path / "shop-001.tar")] == ["a green mug"]


def test_a_table_goes_before_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "shop.tar", GOOD)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}', encoding="utf-8")
    assert list(read_catalog(tmp_path)) == [] and count_rows(tmp_path) == 1


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.txt": "no picture"}, "it has 0 pictures (txt)"),
        ({"a.png": picture(), "a.jpg": picture(kind="JPEG"), "a.txt": "two"}, "it has 2 pictures (jpg, png, txt)"),
        ({"a.png": picture()}, "no caption"),
        ({"a.png": picture(), "a.txt": "  \n"}, "no caption"),
        ({"a.png": picture(), "a.json": '{"text": 7}'}, "no caption"),
        ({"a.png": picture(), "a.txt": b"\xff\xfe"}, "not UTF-8"),
        ({"a.png": picture(), "a.json": "{"}, "not JSON"),
        ({"a.png": picture(), "a.json": "[" * 100_000}, "not JSON"),
        ({"a.png": picture(), "a.json": "[1]"}, "not a JSON object"),
        ({"a.png": picture(), "a.txt": "x" * 2_000_000}, "more than the 1,048,576 of any caption"),
    ],
)
def test_broken_samples(tmp_path: Path, members: dict[str, bytes | str], reason: str) -> None:
    write_shard(tmp_path / "s.tar", {"0.png": picture(), "0.txt": "first", **members, "z.png": picture(), "z.txt": "z"})
    bad: list[InvalidRow] = []
    assert [row.text for row in read_catalog(tmp_path, on_error=bad.append)] == ["first", "z"]
    assert [(row.line, row.file_name) for row in bad] == [(2, "s.tar/a")] and reason in bad[0].reason
    with pytest.raises(DataError, match=r"line 2 \(s\.tar/a\)"):
        list(read_catalog(tmp_path, strict=True))


def test_what_is_no_part_of_a_sample_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/hostname"
            tar.addfile(header)
        for name in ("README", ".hidden", "c.png", "c.cls", "c.txt"):
            data = picture() if name == "c.png" else b"text"
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    (row,) = read_catalog(tmp_path, strict=True)
    assert (row.name, row.text) == ("c.png", "text")


def test_a_shard_that_is_cut_short_gives_what_came_before(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "s.tar", GOOD).read_bytes()
    second = next(sample.image for sample in read_shards([tmp_path / "s.tar"]) if "0002" in sample.name)
    assert second is not None
    (tmp_path / "s.tar").write_bytes(whole[: second.offset + 10])
    write_shard(tmp_path / "t.tar", {"0003.png": picture(), "0003.txt": "a green mug"})
    bad: list[InvalidRow] = []
    texts = [row.text for row in read_catalog(tmp_path, on_error=bad.append)]
    assert texts == ["a red dress", "a green mug"], "the next shard is read all the same"
    assert any("the shard is damaged" in row.reason for row in bad)


def test_a_shard_with_rubbish_in_the_middle_does_not_end_silently(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", GOOD)
    content = bytearray(shard.read_bytes())
    place = next(sample.image for sample in read_shards([shard]) if "0002" in sample.name)
    assert place is not None
    content[place.offset - tarfile.BLOCKSIZE : place.offset] = b"\x7f" * tarfile.BLOCKSIZE
    shard.write_bytes(content)
    bad: list[InvalidRow] = []
    assert len(list(read_catalog(tmp_path, on_error=bad.append))) == 1
    assert "no header at byte" in bad[-1].reason


@pytest.mark.parametrize("content", [b"", b"not a tar file " * 100])
def test_what_is_no_shard_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match="not a tar file"):
        list(read_catalog(tmp_path))


def test_a_compressed_shard_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="decompress"):
        list(read_catalog(tmp_path))


def test_a_shard_that_changed_meanwhile(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", GOOD)
    row = next(read_catalog(tmp_path))
    shard.write_bytes(b"short")
    with pytest.raises(DataError, match=r"0001\.png is no longer in it"):
        row.image()
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        row.image()


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.text(st.sampled_from("ab/é 1"), min_size=1, max_size=120), min_size=1, max_size=4, unique=True),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_picture_is_read_from_where_it_lies(tmp_path_factory: Any, names: list[str], layout: int) -> None:
    """Long and foreign names take extra headers, of which each format of tar has its own."""
    names = [f"{name.strip('/') or 'x'}{number}" for number, name in enumerate(names)]
    content = {name: picture(["red", "blue", "green", "pink"][number]) for number, name in enumerate(names)}
    path = tmp_path_factory.mktemp("shard") / "s.tar"
    try:
        write_shard(path, {f"{name}.png": data for name, data in content.items()}, format=layout)
    except ValueError:  # ustar cannot hold every name
        return
    places = [sample.image for sample in read_shards([path])]
    assert {place.name.removesuffix(".png"): place.read() for place in places if isinstance(place, Member)} == content


def test_a_catalog_takes_a_folder_of_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", GOOD | {"9.png": b"no picture", "9.txt": "broken"})
    with Catalog() as catalog:
        report = catalog.add_folder(tmp_path, copy=False)
        assert (report.added, report.skipped) == (2, 0)
        assert [(bad.line, bad.file_name) for bad in report.failed] == [(3, "9.png")]
        hit = catalog.search("a red dress", limit=1)[0]
        assert hit.load_image().size == (8, 8), "what lies in a shard is copied, whatever copy says"
        assert catalog.add_folder(tmp_path).skipped == 2
