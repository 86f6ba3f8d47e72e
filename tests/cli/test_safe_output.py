"""Text from outside on a real terminal: captions, ids, columns, paths, errors and reports of invalid rows."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from unidiff_sdk import Catalog
from unidiff_sdk._internal.pages.html import Card, CardRow, Page, Section
from unidiff_sdk.cli.console import Command, echo
from unidiff_sdk.cli.main import main
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.training.checkpoints.model_card import model_card

ATTACK = "\x1b]52;c;cm0=\x07\x1b[2J\x9b31m\x7f\u202e\u200b[bold]:heart:\nError: false"
STYLE = re.compile(r"\x1b\[[\d;]*m")  # what the commands themselves print: colors and weights


def on_terminal(*arguments: object) -> str:
    """What `unidiff` sends to a terminal, stdout and stderr together, without styles."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "unidiff_sdk", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm", "COLUMNS": "400"}
    ) as process:
        os.close(terminal)
        sent = b""
        while True:
            try:
                part = os.read(master, 65_536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            sent += part
        os.close(master)
    assert process.returncode in (0, 1)
    return STYLE.sub("", sent.decode()).replace("\r\n", "\n")


def assert_safe(text: str) -> None:
    assert text.replace("\n", "").isprintable(), ascii(text)
    assert not re.search("^Error: false", text, re.MULTILINE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """A catalog whose texts, ids and columns attack the terminal."""
    folder = tmp_path_factory.mktemp("hostile") / "shop.catalog"
    with Catalog(folder, toy) as catalog:
        image = Image.new("RGB", (20, 20))
        catalog.add(image, ATTACK, ATTACK, {ATTACK.replace('"', ""): ATTACK, "catalog": "fashion-man"})
        catalog.add(image.rotate(90), "red", "red", {"catalog": "fashion-man"})
    return folder


def test_terminal_receives_no_control_characters(hostile: Path) -> None:
    shown = on_terminal("search", hostile, "red", "--limit", 5)
    assert_safe(shown)
    assert "[bold]:heart:" in shown and r"\x1b[2J" in shown
    assert_safe(on_terminal("search", hostile, "red", "--like", ATTACK, "--limit", 1))


def test_json_has_the_text_as_escapes(hostile: Path) -> None:
    shown = CliRunner().invoke(main, ["search", str(hostile), "red", "--json"]).stdout
    assert_safe(shown)
    assert ATTACK in {hit["text"] for hit in json.loads(shown)["hits"]}


def test_other_commands_escape_too(hostile: Path, tmp_path: Path, toy: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "400"})
        assert_safe(result.output)
        return result.output

    assert r"\x1b[2J" in run("info", hostile)
    assert r"\x1b[2J" in run("duplicates", hostile, "--threshold", "0.9")
    assert r"\x1b[2J" in run("info", tmp_path / ATTACK)
    assert r"\x1b[2J" in run(ATTACK)
    assert r"\x1b[2J" in run("search", hostile, "red", f"--x{ATTACK[11:]}")
    assert r"\x1b[2J" in run("search", hostile, "red", "--limit", ATTACK)
    assert r"\x1b[2J" in run("delete", tmp_path / ATTACK, "a")
    rows = [{"file_name": f"{ATTACK}.png", "text": ATTACK}, {"file_name": "x.png", "text": ATTACK}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    assert r"\x1b[2J" in run("index", tmp_path, tmp_path / "new.catalog", "--bundle", toy)
    assert_safe(str(InvalidRow(1, ATTACK, ATTACK)))
    assert r"\x1b[2J" in run("generate", ATTACK, "--bundle", toy, "--steps", 1, "-o", tmp_path / "out\x1b[2J")
    assert_safe((tmp_path / "out\x1b[2J" / "generation.json").read_text())


def test_output_that_the_terminal_cannot_encode_is_escaped(hostile: Path) -> None:
    @click.command(cls=Command)
    def tool() -> None:
        """A tool."""
        echo("größe 💡")

    written = CliRunner(charset="latin-1").invoke(tool).stdout_bytes
    assert written == "größe ".encode("latin-1") + rb"\U0001f4a1" + b"\n"


MARKUP = "<img src=x onerror=alert(1)>\"'&"


def test_page_escapes_texts_in_elements_and_attributes() -> None:
    image = Image.new("RGB", (4, 4))
    text = f"{MARKUP}{ATTACK}"
    card = Card(image, text, text, text, text, (image, text), query=True)
    section = Section(text, text, [CardRow(text, [card], text)], [[text, text], [text, text]], code=f"{text}\nend")
    page = Page(text, text, [(text, text)], [section], text, [text]).html()
    assert "<img src=x" not in page and 'alt="&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;' in page
    body = page[page.index("</style>") :]
    assert body.replace("\n", "").isprintable() and "\nend</pre>" in page


def test_model_card_shows_texts_from_outside_as_they_are() -> None:
    caption = 'x")\n```\n<script>alert(1)</script>\nimport os; os.system("\x1b[2J") #'
    meta = {
        "name": "a|b\n# forged",
        "base": "[link](http://evil.example)",
        "data": {"name": "p`](x)", "pairs": 3, "columns": ["a`b\n", "\u202e"]},
        "captions": [caption],
    }
    card = model_card(meta)
    assert card.replace("\n", "").isprintable() and card.count("\n```\n") == 3
    assert "\n# forged" not in card and r"\[link\](http://evil.example)" in card and "`p'](x)`" in card
    call = next(line for line in card.splitlines() if line.startswith("image = pipeline("))
    argument = compile(call, "card", "exec").co_consts[0]
    assert isinstance(argument, str) and argument.startswith("x')") and "<script>" in argument
