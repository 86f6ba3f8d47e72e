"""Atomic file writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.modes import modes_below, umask

from unidiff_sdk._internal.files import atomic_file, remove_unfinished, write_atomically
from unidiff_sdk.errors import StoreError


@pytest.mark.parametrize("fsync", [False, True])
def test_write_atomically_creates_folders_and_replaces_the_file(tmp_path: Path, fsync: bool) -> None:
    path = tmp_path / "a" / "b.json"
    for content in (b"first", b"second, longer"):
        write_atomically(path, content, fsync=fsync)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_new_and_replaced_files_follow_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        for _ in range(2):
            write_atomically(tmp_path / "a" / "b.json", b"content")
    assert modes_below(tmp_path / "a") == ({0o666 & ~mask}, {0o777 & ~mask})


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_unfinished_files_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom unidiff_sdk._internal.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1], 'b.json')) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert killed.returncode == -9 and len(list(tmp_path.iterdir())) == 1
    others = {".download.part", "0123456789abcdef.part", ".0123456789abcdef.part.txt", "b.json"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".0123456789abcdef.part").symlink_to(tmp_path / "b.json")
    with atomic_file(tmp_path / "c.json") as temporary:
        assert remove_unfinished(tmp_path) == 1
        assert temporary.exists(), "a file that is being written is locked"
    assert {path.name for path in tmp_path.iterdir()} == others | {".0123456789abcdef.part", "c.json"}
    assert remove_unfinished(tmp_path / "missing") == 0


def test_unwritable_path_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/b\.json cannot be written: "):
        write_atomically(tmp_path / "file" / "b.json", b"")
