"""Parts, chunks and the record of a bulk job, without Ray."""

from __future__ import annotations

import errno
import io
import json
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.peak_memory import run_measured

from unidiff_sdk import DataError, StoreError
from unidiff_sdk.datasets.reader import EmbeddedImage, Row
from unidiff_sdk.scale import parts
from unidiff_sdk.scale.parts import CHUNK_ROWS, find_parts, read_chunks
from unidiff_sdk.scale.run_file import RunFile


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(rows: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(rows):
            for suffix, content in ((".png", png(number)), (".txt", f"item {number}".encode())):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_chunks_hold_each_row_once_and_end_with_the_last(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(shard(2 * CHUNK_ROWS + 5))
    (part,) = find_parts(tmp_path)
    chunks = list(read_chunks(part, None, None))
    assert [len(rows) for rows, _, _ in chunks] == [CHUNK_ROWS, CHUNK_ROWS, 5]
    assert [last for *_, last in chunks] == [False, False, True]
    assert [row.text for rows, _, _ in chunks for row in rows] == [f"item {n}" for n in range(2 * CHUNK_ROWS + 5)]
    assert chunks[0][0][3].image == png(3)


def test_damaged_shard_keeps_the_rows_before_the_damage(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(shard(20)[:10_000])
    (tmp_path / "1.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "2.tar").write_bytes(shard(3))
    found = {Path(part.path).name: list(read_chunks(part, None, None)) for part in find_parts(tmp_path)}
    rows = {name: sum(len(chunk[0]) for chunk in chunks) for name, chunks in found.items()}
    assert rows["2.tar"] == 3 and 0 < rows["0.tar"] < 20 and rows["1.tar"] == 0
    for name in ("0.tar", "1.tar"):
        assert any(row.hides_later_rows for _, invalid, _ in found[name] for row in invalid), name


def test_parts_of_object_storage_are_read(tmp_path: Path) -> None:
    files, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    table = pa.table({"image": [png(9)], "text": ["nine"]})
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    for name, content in {"deep/b.tar": shard(1), "readme.md": b"text"}.items():
        files.pipe_file(f"{root}/{name}", content)
    files.pipe_file(f"{root}/other/b.parquet", (tmp_path / "b.parquet").read_bytes())
    url = f"memory:/{root}"
    assert [part.path for part in find_parts(url)] == ["other/b.parquet"], "the first layout, as of a folder"
    files.pipe_file(f"{root}/a.tar", shard(3))
    assert [part.path for part in find_parts(url)] == ["a.tar"], "shards at the top come first, as of a folder"
    (part,) = find_parts(f"{url}/other")
    assert [[row.text for row in rows] for rows, *_ in read_chunks(part, None, None)] == [["nine"]]
    files.rm_file(f"{root}/other/b.parquet")
    (part,) = find_parts(f"{url}/a.tar")
    assert [row.text for rows, *_ in read_chunks(part, None, None) for row in rows] == ["item 0", "item 1", "item 2"]
    files.pipe_file(f"{root}/a.tar", shard(4))
    with pytest.raises(StoreError, match="has changed"):
        list(read_chunks(part, None, None))
    files.rm_file(f"{root}/a.tar")
    assert [part.path for part in find_parts(url)] == ["deep/b.tar"]
    with pytest.raises(StoreError, match="is missing"):
        list(read_chunks(part, None, None))
    for missing in ("memory://none", f"{url}/a.tar"):
        with pytest.raises(DataError, match="there are no files"):
            find_parts(missing)


def with_table(folder: Path, rows: int) -> Path:
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"item {number}"}) for number in range(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for number in range(rows):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


@settings(max_examples=25, deadline=None)
@given(missing=st.sets(st.integers(0, 3 * CHUNK_ROWS + 9)))
def test_the_chunk_of_a_row_does_not_depend_on_which_images_exist(
    tmp_path_factory: pytest.TempPathFactory, missing: set[int]
) -> None:
    """A resumed job skips chunks by their numbers, and images may have come or gone since it began."""
    count = 3 * CHUNK_ROWS + 10
    folder = with_table(tmp_path_factory.mktemp("table"), count)
    for number in missing:
        (folder / f"{number}.png").unlink()
    (part,) = find_parts(folder)
    found = list(read_chunks(part, None, None))
    assert [last for *_, last in found] == [False] * 3 + [True]
    for chunk, (rows, invalid, _) in enumerate(found):
        numbers = set(range(chunk * CHUNK_ROWS, min(count, (chunk + 1) * CHUNK_ROWS)))
        assert {row.line - 1 for row in rows} == numbers - missing
        assert {row.line - 1 for row in invalid} == numbers & missing


def test_change_of_a_folder_of_images_is_a_change_of_its_part(tmp_path: Path) -> None:
    for name in ("0.png", "deep/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    (before,) = find_parts(tmp_path)
    time.sleep(0.02)  # the resolution of the times of some file systems
    (tmp_path / "deep" / "0.png").write_bytes(png(1))
    (added,) = find_parts(tmp_path)
    time.sleep(0.02)
    (tmp_path / "deep" / "0.png").rename(tmp_path / "deep" / "2.png")
    (renamed,) = find_parts(tmp_path)
    assert before.size == 2 and added.size == renamed.size == 3
    assert len({before.modified, added.modified, renamed.modified}) == 3


def test_part_that_this_machine_cannot_read_is_an_error_and_not_an_invalid_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system is not mounted, another machine or a later run reads the part."""
    (tmp_path / "0.tar").write_bytes(shard(3))
    (part,) = find_parts(tmp_path)
    (tmp_path / "0.tar").write_bytes(shard(4))
    with pytest.raises(StoreError, match="has changed"):
        list(read_chunks(part, None, None))
    (tmp_path / "0.tar").unlink()
    with pytest.raises(StoreError, match="on all machines"):
        list(read_chunks(part, None, None))
    (tmp_path / "0.tar").write_bytes(shard(3))
    (part,) = find_parts(tmp_path)

    def broken(*args: object, **options: object) -> Iterator[Row]:
        yield Row(EmbeddedImage("0.png", png(0)), "zero", line=1)
        raise DataError("0.tar: cannot be read") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(parts, "read_catalog", broken)
    with pytest.raises(StoreError, match="cannot be read"):
        list(read_chunks(part, None, None))


def test_rows_before_damage_in_the_same_chunk_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar").write_bytes(shard(3))
    (part,) = find_parts(tmp_path)

    def damaged(*args: object, **options: object) -> Iterator[Row]:
        for number in range(CHUNK_ROWS + 9):
            yield Row(EmbeddedImage("0.png", png(0)), "", line=number + 1)
        raise DataError("a page of the file is damaged")

    monkeypatch.setattr(parts, "read_catalog", damaged)
    *_, (rows, invalid, last) = read_chunks(part, None, None)
    assert len(rows) == 9 and last and [row.hides_later_rows for row in invalid] == [True]


def test_remote_shard_is_copied_in_blocks(tmp_path: Path) -> None:
    """A shard of gigabytes must not take as much memory."""
    size = 300 << 20
    (tmp_path / "0.tar").write_bytes(shard(3))
    with (tmp_path / "0.tar").open("ab") as file:
        file.truncate(size)  # a tar file may end with any number of zeros
    script = """
import sys
from unidiff_sdk.scale.parts import find_parts, read_chunks
for url in sys.argv[1:]:
    (part,) = find_parts(url)
    print(sum(len(rows) for rows, *_ in read_chunks(part, None, None)))
"""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "0.tar").write_bytes(shard(3))
    _, usual = run_measured(script, f"local://{tmp_path}/small/0.tar")
    lines, peak = run_measured(script, f"local://{tmp_path}/0.tar")
    assert lines == ["3"] and peak < usual + size / 4


# ------------------------------------------------------------------------------------------------ the record


def entry(part: int, chunk: int, last: bool = False) -> dict[str, object]:
    return {"part": part, "chunk": chunk, "last": last, "added": 1, "skipped": 0, "failed": []}


def test_record_is_resumed_and_of_one_job(tmp_path: Path) -> None:
    file = RunFile(tmp_path / "run.jsonl", {"source": "a"}, resume=False)
    for each in (entry(0, 1), entry(0, 0), entry(1, 0), entry(0, 2, last=True), entry(0, 1)):
        file.add(each)
    file.close()
    again = RunFile(tmp_path / "run.jsonl", {"source": "a"}, resume=True)
    assert again.done == {0: {0, 1, 2}, 1: {0}} and again.complete == {0}
    assert len(list(again.entries())) == 4
    again.close()
    with pytest.raises(DataError, match="another job"):
        RunFile(tmp_path / "run.jsonl", {"source": "b"}, resume=True)
    with pytest.raises(DataError, match="no record"):
        RunFile(tmp_path / "none.jsonl", {"source": "a"}, resume=True)
    assert RunFile(tmp_path / "run.jsonl", {"source": "a"}, resume=False).done == {}


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=12))
def test_record_cut_anywhere_never_claims_what_was_not_done(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    file = RunFile(path, {}, resume=False)
    head = path.stat().st_size
    for number in range(5):
        file.add(entry(number, 0, last=True))
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: head + cut] + noise.replace(b"\n", b""))
    try:
        again = RunFile(path, {}, resume=True)
    except DataError:
        pytest.fail("a killed process may leave any end of the file")
    assert again.complete == set(range(len(again.complete)))
    again.add(entry(4, 0, last=True))
    again.close()
    assert 4 in RunFile(path, {}, resume=True).complete
    assert json.loads(path.read_text(errors="replace").splitlines()[-1])["part"] == 4
