"""The README is short, opens with its two commands, and has no dead links."""

from __future__ import annotations

import re

from .pages import ROOT, blocks_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()
MOST_LINES, MOST_EXAMPLE_LINES = 150, 15

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)", re.S)


def test_readme_is_short() -> None:
    assert len(LINES) <= MOST_LINES


def test_readme_opens_with_its_two_commands() -> None:
    first, second, *_ = (line.split("#")[0].strip() for line in LINES if line.startswith("    "))
    assert (first, second) == ("make demo", "make test")


def test_readme_has_one_short_example() -> None:
    (example,) = (block for block in blocks_of(ROOT / "README.md") if block.language == "python")
    assert len(example.code.strip().splitlines()) <= MOST_EXAMPLE_LINES


def test_readme_has_no_dead_links() -> None:
    targets = _LINK.findall(README)
    assert len(targets) > 10
    for target in targets:
        path, _, anchor = target.partition("#")
        file = ROOT / path
        assert file.exists(), f"README.md links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{path} has no heading for #{anchor}"


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
