"""Every Python block of the README and the documentation runs, and every `unidiff` command in them is a valid one.

The blocks of a page run in order, in one namespace and one folder; so do the page's shell commands, between them. The
folder holds what the quickstart makes: `products`, 300 synthetic products, and `shop.catalog`, their catalog. A `text`
block with the class `output` states what the block before it prints; numbers with decimals may differ between machines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tomllib
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from .pages import PAGES, ROOT, Block, blocks_of, commands_in

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
EMPTY_START = {"README.md", "docs/quickstart.md"}  # pages that make `products` themselves
SLOW_PAGES = {"docs/guides/train.md", "docs/guides/evaluate.md", "docs/guides/export.md"}

NOT_RUN = "not-run"  # class of a shell block that is parsed only
REASONS_NOT_RUN = {  # page: how many such blocks it has, and why
    "docs/guides/bring.md": (8, "needs checkpoints of Stable Diffusion"),
    "docs/guides/browser.md": (2, "needs the built page and an exported bundle"),
    "docs/guides/bulk.md": (3, "needs a Qdrant server and a bucket"),
    "docs/guides/data.md": (2, "the data exists on the machine of the reader only"),
    "docs/guides/deploy.md": (1, "needs a Qdrant server"),
    "docs/guides/evaluate.md": (1, "needs a tuned checkpoint"),
    "docs/guides/export.md": (3, "exports three times, for minutes, and needs a key and data"),
    "docs/guides/gpu.md": (1, "exports for a GPU, for minutes"),
    "docs/guides/mcp.md": (2, "a server runs until it is stopped"),
    "docs/guides/object_storage.md": (1, "needs a Qdrant server and a bucket"),
    "docs/guides/reindex.md": (2, "needs a bundle of another model"),
    "docs/guides/search_only.md": (2, "needs a CLIP"),
    "docs/guides/serve.md": (6, "a server runs until it is stopped"),
    "docs/guides/train.md": (4, "trains for minutes, and needs Stable Diffusion XL and 3.5"),
}

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
        if NOT_RUN in block.classes:
            continue
        if block.language == "python":
            printed = run_python(block, namespace)
        elif block.language == "bash":
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
def test_page_runs(page: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("needs-torch" in block.classes for block in blocks_of(page)):
        pytest.importorskip("torch", reason="the page needs the extras train and export")
    if page.relative_to(ROOT).as_posix() not in EMPTY_START:
        shutil.copytree(shop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_only_the_listed_blocks_are_not_run() -> None:
    left_out = [block for page in PAGES for block in blocks_of(page) if NOT_RUN in block.classes]
    assert Counter(block.page for block in left_out) == {page: count for page, (count, _) in REASONS_NOT_RUN.items()}
    assert {block.language for block in left_out} == {"bash"}  # all Python blocks run


# ------------------------------------------------------------------------------------------------ commands


COMMANDS = [
    pytest.param(command, id=f"{block}-{number}")
    for page in PAGES
    for block in blocks_of(page)
    if block.language in ("bash", "text")
    for number, command in enumerate(commands_in(block))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_valid(command: list[str]) -> None:
    script, *arguments = command
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


def test_parse_rejects_unknown_commands_and_options() -> None:
    for line in ("unidiff serch shop.catalog", "unidiff search shop.catalog boots --limt 3", "unidiff-train x --bse y"):
        script, *arguments = line.split()
        with pytest.raises(click.UsageError):
            parse(command_of(script), script, arguments)


def test_invalid_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "README.md"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NameError):
        run_python(Block(page.name, 1, "python", frozenset(), "undefined"), {})
    with pytest.raises(AssertionError):
        run_commands(Block(page.name, 1, "bash", frozenset(), "unidiff info missing.catalog"))
    assert not os.listdir(tmp_path)
