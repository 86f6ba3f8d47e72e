"""Parts, chunks and the record of a bulk job, without Ray."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
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

from unidiff_sdk import DataError
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
    assert [len(rows) for rows, _, _ in chunks] == [CHUNK_ROWS, CHUNK_ROWS, 5, 0]
    assert [last for *_, last in chunks] == [False, False, False, True]
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
    for name, content in {"a.tar": shard(3), "deep/b.tar": shard(1), "readme.md": b"text"}.items():
        files.pipe_file(f"{root}/{name}", content)
    files.pipe_file(f"{root}/other/b.parquet", (tmp_path / "b.parquet").read_bytes())
    url = f"memory:/{root}"
    assert [part.path for part in find_parts(url)] == ["other/b.parquet"], "the first layout, as of a folder"
    parts = find_parts(f"{url}/other")
    assert [[row.text for row in rows] for rows, *_ in read_chunks(parts[0], None, None)] == [["nine"], []]
    files.rm_file(f"{root}/other/b.parquet")
    assert [part.path for part in find_parts(url)] == ["a.tar", "deep/b.tar"]
    (part,) = find_parts(f"{url}/a.tar")
    assert [row.text for rows, *_ in read_chunks(part, None, None) for row in rows] == ["item 0", "item 1", "item 2"]
    files.rm_file(f"{root}/a.tar")
    (_, invalid, last), *_ = read_chunks(part, None, None)
    assert last and "was deleted" in invalid[0].reason
    for missing in ("memory://none", f"{url}/a.tar"):
        with pytest.raises(DataError, match="there are no files"):
            find_parts(missing)


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
