"""The reference pages document every public name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import unidiff_sdk
from unidiff_sdk import errors, training

from .pages import DOCS, ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def documented(page: Path, prefix: str) -> set[str]:
    """What follows `::: prefix` on a page."""
    return set(re.findall(rf"^::: {re.escape(prefix)}(\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_public_name_is_documented() -> None:
    names = documented(DOCS / "reference/python.md", "unidiff_sdk.")
    assert "errors" in names  # the module, with all of them
    assert set(unidiff_sdk.__all__) - set(errors.__all__) - {"__version__"} <= names


def test_every_training_name_is_documented() -> None:
    assert set(training.__all__) <= documented(DOCS / "reference/training.md", "unidiff_sdk.training.")


def test_every_script_is_documented() -> None:
    assert documented(DOCS / "reference/cli.md", "cli ") == set(SCRIPTS)
