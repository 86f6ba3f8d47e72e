"""Every Python block of the README and the documentation runs, and every `unidiff` command in them is a valid one.

The blocks of a page run in order, in one namespace and one folder; so do the page's shell commands, between them. The
folder holds what the quickstart makes: `products`, 300 synthetic products, and `shop.catalog`, their catalog. A `text`
block with the class `output` states what the block before it prints; numbers with decimals may differ between machines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from .pages import PAGES, ROOT, Block, blocks_of, commands_in

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
HAS_TORCH = importlib.util.find_spec("torch") is not None
EMPTY_START = {"README.md", "docs/quickstart.md"}  # pages that make `products` themselves
SLOW_PAGES = {"docs/guides/train.md", "docs/guides/evaluate.md", "docs/guides/export.md"}

# Classes of a fence whose block is not run, and why. Their commands are still parsed.
NOT_RUN = {
    "not-run": "takes minutes, or needs data, a server or a GPU that a test machine lacks",
}
MOST_NOT_RUN = 12  # blocks; `test_few_blocks_are_not_run` names them

RUNNABLE = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the quickstart leaves."""
    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import write_catalog

    folder = tmp_path_factory.mktemp("shop")
    write_catalog("fashion-woman", folder / "products", n=300, split="test-unseen")
    with Catalog(folder / "shop.catalog") as catalog:
        catalog.add_folder(folder / "products")
    return folder


def run_page(page: Path) -> None:
    """Run the blocks of a page in the working directory."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page):
        if block.classes & NOT_RUN.keys():
            continue
        if block.language == "python" and (HAS_TORCH or "needs-torch" not in block.classes):
            printed = run_python(block, namespace)
        elif block.language == "bash" and (HAS_TORCH or "needs-torch" not in block.classes):
            run_commands(block)
        elif "output" in block.classes:
            assert comparable(printed) == comparable(block.code), f"{block}: the code before it prints\n{printed}"


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    code = compile("\n" * block.line + block.code, str(ROOT / block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def run_commands(block: Block) -> None:
    for script, *arguments in commands_in(block):
        result = CliRunner().invoke(command_of(script), arguments, prog_name=script, catch_exceptions=False)
        assert result.exit_code == 0, f"{block}: {script} {' '.join(arguments)}\n{result.output}"


def comparable(text: str) -> str:
    return re.sub(r"\d+\.\d+", "#", text).strip()


def command_of(script: str) -> click.Command:
    module, name = SCRIPTS[script].split(":")
    command: click.Command = getattr(import_module(module), name)
    return command


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if name in SLOW_PAGES else (), id=name)
        for page in RUNNABLE
        for name in [page.relative_to(ROOT).as_posix()]
    ],
)
@pytest.mark.filterwarnings('ignore:The bundle "tiny" was trained on')
def test_blocks_run(page: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.relative_to(ROOT).as_posix() not in EMPTY_START:
        shutil.copytree(shop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_few_blocks_are_not_run() -> None:
    left_out = [block for page in PAGES for block in blocks_of(page) if block.classes & NOT_RUN.keys()]
    assert len(left_out) <= MOST_NOT_RUN, "\n".join(map(str, left_out))
    assert {block.language for block in left_out} <= {"bash"}  # of Python, everything runs


# ------------------------------------------------------------------------------------------------ commands


COMMANDS = [
    pytest.param(words, id=f"{block}-{number}")
    for page in PAGES
    for block in blocks_of(page)
    if block.language in ("bash", "text")
    for number, words in enumerate(commands_in(block))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_valid(words: list[str]) -> None:
    script, *arguments = words
    parse(command_of(script), script, arguments)


def parse(command: click.Command, name: str, arguments: list[str]) -> None:
    """Raise click's error where a command, an option or a value does not exist; nothing is run."""
    others: dict[str, click.Command] = getattr(command, "others", {})
    if arguments and arguments[0] in others:
        return parse(others[arguments[0]], f"{name} {arguments[0]}", arguments[1:])
    with command.make_context(name, list(arguments)) as context:
        if isinstance(command, click.Group):
            _, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert child is not None, f"{name} has no command {arguments[0]}"
            parse(child, f"{name} {child.name}", rest)


def test_parse_refuses_what_does_not_exist() -> None:
    for line in ("unidiff serch shop.catalog", "unidiff search shop.catalog boots --limt 3", "unidiff-train x --bse y"):
        script, *arguments = line.split()
        with pytest.raises(click.UsageError):
            parse(command_of(script), script, arguments)


def test_an_invalid_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "README.md"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NameError):
        run_python(Block(page.name, 1, "python", frozenset(), "undefined"), {})
    with pytest.raises(AssertionError):
        run_commands(Block(page.name, 1, "bash", frozenset(), "unidiff info missing.catalog"))
    assert not os.listdir(tmp_path)
