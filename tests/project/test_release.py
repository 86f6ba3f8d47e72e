"""A tag is released only if version, changelog and built files agree with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / ".ci" / "check_release.py"
CHANGELOG = """# Changelog

## [Unreleased]

### Added

- Something new.

## [1.2.0] - 2026-11-28

### Fixed

- A fix.

## [1.1.0] - 2026-10-01

- Old.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of version 1.2.0 that can be released, with a copy of the check."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / CHECK.name).write_text(CHECK.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "a-b"\nversion = "1.2.0"\n', encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    (tmp_path / "dist").mkdir()
    for name in ("a_b-1.2.0.tar.gz", "a_b-1.2.0-py3-none-any.whl"):
        (tmp_path / "dist" / name).touch()
    return tmp_path


def check(project: Path, tag: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, project / ".ci" / CHECK.name, tag, project / "notes.md"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_complete_release_passes_and_its_section_becomes_the_notes(project: Path) -> None:
    assert check(project, "v1.2.0").returncode == 0
    assert (project / "notes.md").read_text(encoding="utf-8") == "### Fixed\n\n- A fix.\n"


@pytest.mark.parametrize("tag", ["v1.2.1", "1.2.0", "v1.2.0rc1"])
def test_a_tag_of_another_version_is_refused(project: Path, tag: str) -> None:
    done = check(project, tag)
    assert done.returncode == 1 and "v1.2.0" in done.stderr and tag in done.stderr


@pytest.mark.parametrize(
    "changelog",
    [
        CHANGELOG.replace("1.2.0", "1.3.0"),
        CHANGELOG.replace(" - 2026-11-28", ""),
        CHANGELOG.replace("### Fixed\n\n- A fix.\n", ""),
    ],
    ids=["absent", "undated", "empty"],
)
def test_a_version_without_a_changelog_section_is_refused(project: Path, changelog: str) -> None:
    (project / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    done = check(project, "v1.2.0")
    assert done.returncode == 1 and "## [1.2.0]" in done.stderr


def test_files_of_another_version_are_refused(project: Path) -> None:
    (project / "dist" / "a_b-1.1.0.tar.gz").touch()
    done = check(project, "v1.2.0")
    assert done.returncode == 1 and "a_b-1.1.0.tar.gz" in done.stderr and "make dist" in done.stderr
