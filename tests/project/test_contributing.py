"""Every path, symbol, make target and command in CONTRIBUTING.md, SECURITY.md and the templates exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = ("CONTRIBUTING.md", "SECURITY.md")
TEMPLATES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.*") if path.is_file())
GENERATED = ("site/", "dist/", "notes.md", "shop.catalog")  # outputs, which a checkout does not hold
RECIPES = 5

_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"[\w.-]*/[\w./-]*|[\w-]+\.(?:md|py|toml|txt|yml|yaml)")
_STEP = re.compile(r"^\d+\. (.*?)(?=^\d+\. |^#|^$)", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def paths_in(text: str) -> set[str]:
    """The relative paths that a text names as code or links to."""
    named = {code for code in _CODE.findall(text) if _PATH.fullmatch(code)}
    named |= {link for link in _LINK.findall(text) if "://" not in link}
    return {path for path in named if not path.startswith(GENERATED)}


def recipes() -> dict[str, str]:
    """The recipes of CONTRIBUTING.md by their titles."""
    section = read("CONTRIBUTING.md").partition("\n## Recipes\n")[2].partition("\n## ")[0]
    _, *parts = section.split("\n### ")
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_paths_are_found() -> None:
    assert len(paths_in(read("CONTRIBUTING.md"))) > 20


@pytest.mark.parametrize("guide", GUIDES)
def test_paths_exist(guide: str) -> None:
    gone = [path for path in sorted(paths_in(read(guide))) if not (ROOT / path).exists()]
    assert not gone, f"{guide} names files that do not exist: {gone}"


def test_the_layout_lists_existing_folders() -> None:
    layout = read("CONTRIBUTING.md").partition("## Layout\n")[2].partition("Imports run")[0]
    runtime = re.findall(r"^      ([\w/]+/)\s", layout, re.MULTILINE)
    packages = {path.name for path in (ROOT / "unidiff_sdk").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name.split("/")[0] for name in runtime} == packages
    top = re.findall(r"^    ([\w/]+/)", layout, re.MULTILINE)
    assert top and all((ROOT / name).is_dir() for name in top)


@pytest.mark.parametrize("title", recipes())
def test_each_step_of_a_recipe_names_files_and_symbols_in_them(title: str) -> None:
    steps = _STEP.findall(recipes()[title] + "\n\n")
    assert len(steps) >= 3
    for step in steps:
        files = sorted(paths_in(step))
        assert files, f"{title}: no file in the step {step!r}"
        source = "\n".join(read(file) for file in files)
        symbols = {code for code in _CODE.findall(step) if code.isidentifier()}
        gone = {symbol for symbol in symbols if not re.search(rf"\b{symbol}\b", source)}
        assert not gone, f"CONTRIBUTING.md, {title}: {gone} not in {files}"
    assert any(path.startswith("tests/") for path in paths_in(recipes()[title])), f"{title}: no test to write"
    assert any(path.startswith("docs/") for path in paths_in(recipes()[title])), f"{title}: nothing to document"


def test_the_recipes_are_found() -> None:
    assert len(recipes()) == RECIPES


@pytest.mark.parametrize("file", [*GUIDES, *TEMPLATES, ".pre-commit-config.yaml"])
def test_make_targets_exist(file: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    lines = re.findall(r"(?:`|^ {4}|run: |\()make ([a-z -]+)", read(file), re.MULTILINE)
    named = {word for line in lines for word in line.split(" #")[0].split("  ")[0].split()}
    assert named <= targets


@pytest.mark.parametrize("file", [*GUIDES, *TEMPLATES])
def test_commands_exist(file: str) -> None:
    from unidiff_sdk.cli.main import main

    named = set(re.findall(r"`unidiff ([a-z]+)", read(file)))
    assert named <= set(main.commands)
