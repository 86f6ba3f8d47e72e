"""The messages on the troubleshooting page are those of the code."""

from __future__ import annotations

import ast

import pytest

from .pages import DOCS, ROOT, Block, blocks_of

VALUE = "…"  # stands for a value, in messages of the page and in templates of the code
LEAST_LETTERS = 18  # of a message without its values: less would match anything

MESSAGES = [block for block in blocks_of(DOCS / "troubleshooting.md") if "message" in block.classes]


@pytest.fixture(scope="module")
def templates() -> list[str]:
    """Every string of the code, with `VALUE` for what is put into it."""
    files = [file for folder in ("unidiff_sdk", "export") for file in (ROOT / folder).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [text for node in nodes if (text := template(node))]


def template(node: ast.AST) -> str:
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(template(part) or VALUE for part in parts)
    return ""


def fits(message: str, text: str) -> bool:
    """Whether the fixed parts of a message stand in a template, in their order."""
    place = 0
    for part in filter(None, (part.strip() for part in message.split(VALUE))):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("block", MESSAGES, ids=str)
def test_message_exists(block: Block, templates: list[str]) -> None:
    message = " ".join(block.code.split())
    assert len(message.replace(VALUE, "")) >= LEAST_LETTERS
    assert any(fits(message, text) for text in templates), f"{block}: no message of the code fits:\n{message}"


def test_invented_message_does_not_fit(templates: list[str]) -> None:
    assert len(MESSAGES) > 30
    assert not any(fits("the server is in … by another planet", text) for text in templates)
