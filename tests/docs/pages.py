"""Reads the documentation: its pages, their code blocks, and the shell commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCS", "PAGES", "ROOT", "Block", "blocks_of", "commands_in"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# ```python, or with classes ``` { .python .needs-torch }; the fence may be indented, in a list or a tab.
_FENCE = re.compile(r"(?ms)^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)(?P=fence) *$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        page: relative to the repository.
        line: of its fence, from 1.
        language: "python", "bash", "text", …; "" if it has none.
        classes: what else its fence says, such as "needs-torch".
    """

    page: str
    line: int
    language: str
    classes: frozenset[str]
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [_block(page, text, found) for found in _FENCE.finditer(text)]


def _block(page: Path, text: str, found: re.Match[str]) -> Block:
    names = [name.lstrip(".") for name in found["info"].replace("{", " ").replace("}", " ").split()]
    indent = len(found["indent"])
    code = "".join(line[indent:] if line.strip() else line for line in found["code"].splitlines(keepends=True))
    line = text.count("\n", 0, found.start()) + 1
    file = page.relative_to(ROOT).as_posix()
    return Block(file, line, names[0] if names else "", frozenset(names[1:]), code)


def commands_in(block: Block) -> Iterator[list[str]]:
    """The arguments of each `unidiff…` command of a block; continued lines are joined, comments left out."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.startswith("unidiff"):
            yield shlex.split(line, comments=True)
