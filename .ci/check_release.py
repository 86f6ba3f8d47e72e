"""Check that a tag can be released: `python .ci/check_release.py v0.1.0 [NOTES.md]`.

The tag must be "v" and the version in pyproject.toml, CHANGELOG.md must have a section of that version with a date and
with text, and dist/ must hold exactly the sdist and the wheel of that version. With a second argument, the section is
written to that file as the notes of the release.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check(tag: str, root: Path = ROOT) -> str:
    """Return the changelog section of `tag`, or exit with what is missing."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    if tag != f"v{version}":
        sys.exit(f"The tag {tag} is not v{version}, the version in pyproject.toml. Change one of them.")
    notes = section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if not notes:
        sys.exit(f'CHANGELOG.md has no section "## [{version}] - YYYY-MM-DD" with text. Move "Unreleased" there.')
    stem = f"{project['name'].replace('-', '_')}-{version}"
    expected = {f"{stem}.tar.gz", f"{stem}-py3-none-any.whl"}
    found = {file.name for file in (root / "dist").glob("*")}
    if found != expected:
        sys.exit(f"dist/ holds {sorted(found) or 'nothing'}, not {sorted(expected)}. Run `make dist`.")
    return notes


def section(changelog: str, version: str) -> str:
    """The text under the dated heading of `version`, without the heading; empty if there is none."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    match = re.search(rf"{heading}\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""


if __name__ == "__main__":
    text = check(sys.argv[1])
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n", encoding="utf-8")
