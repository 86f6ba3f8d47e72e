"""Replacing folders: nothing is lost if the process is killed, and only folders of the same name are touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unidiff_sdk._internal.files import recover_folder, replacement_folder
from unidiff_sdk.errors import StoreError

NAMES = ["shop", "run[1]", "shop.fast", "a*b", "ünï code", "-x", "shop.1"]

# Kills itself at a step of replacing the folder: while it writes, between the two renames, or before it deletes.
KILLED = """
import os, pathlib, signal, sys
from unidiff_sdk._internal import files
path, where = pathlib.Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
renames = []
def on_audit(event, arguments):
    if event == "os.rename":
        renames.append(1)
        if where == "between" and len(renames) == 2: kill()
sys.addaudithook(on_audit)
with files.replacement_folder(path, ValueError, retire=kill if where == "retire" else files._remove_folder) as new:
    (new / "content").write_text("new")
    if where == "write": kill()
"""


def content(path: Path) -> str:
    return (path / "content").read_text()


def make(path: Path, text: str = "old") -> Path:
    path.mkdir()
    (path / "content").write_text(text)
    return path


def killed(path: Path, where: str) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, path, where], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_new_folder_replaces_the_old_one(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / name)
    with replacement_folder(path, StoreError) as new:
        (new / "content").write_text("new")
        assert content(path) == "old"
    assert content(path) == "new" and list(tmp_path.iterdir()) == [path]


def test_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    path = make(tmp_path / "shop")
    with pytest.raises(KeyboardInterrupt), replacement_folder(path, StoreError):
        raise KeyboardInterrupt
    assert content(path) == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["write", "between", "retire"])
@pytest.mark.parametrize("name", ["shop", "run[1]"])
def test_recovery_after_a_kill_touches_no_other_folder(tmp_path: Path, name: str, where: str) -> None:
    path, other = make(tmp_path / name), make(tmp_path / f"{name}.fast", "other")
    killed(path, where)
    killed(other, "between")
    assert not other.exists(), "it is set aside"
    recover_folder(path)
    assert content(path) == ("new" if where == "retire" else "old")
    recover_folder(other)
    assert content(other) == "other" and sorted(tmp_path.iterdir()) == [path, other]


def test_next_replacement_recovers_first(tmp_path: Path) -> None:
    path = make(tmp_path / "shop")
    killed(path, "between")
    with pytest.raises(KeyboardInterrupt), replacement_folder(path, StoreError):
        raise KeyboardInterrupt
    assert content(path) == "old" and list(tmp_path.iterdir()) == [path]


def test_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    path = make(tmp_path / "shop")
    script = KILLED.replace('if where == "write": kill()', 'print("ready", flush=True); sys.stdin.read()')
    with subprocess.Popen(
        [sys.executable, "-c", script, path, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        recover_folder(path)
        with (
            pytest.raises(StoreError, match="Another process is writing"),
            replacement_folder(path, StoreError),
        ):
            pytest.fail("two processes must not write one folder")
        writer.stdin.close()
    assert writer.returncode == 0 and content(path) == "new" and list(tmp_path.iterdir()) == [path]


def test_linked_folder_is_replaced_where_it_is(tmp_path: Path) -> None:
    target = make(tmp_path / "disk")
    (tmp_path / "shop").symlink_to(target)
    with replacement_folder(tmp_path / "shop", StoreError) as new:
        (new / "content").write_text("new")
    assert (tmp_path / "shop").is_symlink() and content(target) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "shop"]


@pytest.mark.parametrize(
    "name", [".shop.old", ".shop.partial-save.old.bak", ".shop.x.12.old", ".shop.old-", ".shop.12.older", "shop.12.old"]
)
def test_folders_with_other_names_are_kept(tmp_path: Path, name: str) -> None:
    other = make(tmp_path / name)
    recover_folder(tmp_path / "shop")
    assert list(tmp_path.iterdir()) == [other] and content(other) == "old"


@pytest.mark.parametrize("name", [".{}.{}.old", ".{}.old-{}"])
@pytest.mark.parametrize("run", ["shop", "run[1]"])
def test_leftovers_of_0_1_are_restored_though_their_number_is_in_use(tmp_path: Path, run: str, name: str) -> None:
    make(tmp_path / name.format(run, os.getppid()))
    fast = make(tmp_path / name.format(f"{run}.fast", 2**22 + 1))
    recover_folder(tmp_path / run)
    assert content(tmp_path / run) == "old" and sorted(tmp_path.iterdir()) == sorted([tmp_path / run, fast])


@pytest.mark.parametrize("name", [".shop.{}.tmp", ".shop.partial-{}", ".shop.{}.old"])
def test_leftovers_of_0_1_are_deleted(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "shop", "current")
    make(tmp_path / name.format(2**22 + 1))  # no process has such a number
    recover_folder(path)
    assert content(path) == "current" and list(tmp_path.iterdir()) == [path]
