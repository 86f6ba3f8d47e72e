"""Stored paths: what stays in the folder is resolved, all else is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff_sdk._internal.files import resolve_stored
from unidiff_sdk.errors import StoreError


def test_resolve_stored_accepts_plain_paths_below_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve_stored(tmp_path / "link", "a/b c.png", StoreError) == tmp_path / "link" / "a" / "b c.png"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/..", "../a", "a/../../b", "/etc/passwd", "a//b", "a\\b", "a\0b", "./a"]
)
def test_resolve_stored_refuses_other_forms(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="not a plain path"):
        resolve_stored(tmp_path, name, StoreError)


@pytest.mark.parametrize("target", ["../outside", "inside", "loop"])
def test_resolve_stored_refuses_links(tmp_path: Path, target: str) -> None:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "loop").symlink_to(target)
    for name in ("loop", "loop/file"):
        with pytest.raises(StoreError, match=r"link|cannot be resolved"):
            resolve_stored(root, name, StoreError)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "link", "", "/", "\\", "~", "%2e%2e", "\0", "é"]), max_size=6))
def test_resolve_stored_never_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "stored"
    root.mkdir(exist_ok=True)
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("..")
    try:
        path = resolve_stored(root, "/".join(parts), StoreError)
    except StoreError:
        return
    assert os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)
