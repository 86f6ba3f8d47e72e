"""Formulas as MathML, which browsers render themselves: no script and no fonts to load."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex left: LaTeX between \\( and \\) in a line, between \\[ and \\] as a block."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, latex = found.groups()
    formula = convert(html.unescape(latex).strip(), display="block" if tag == "div" else "inline")
    return f'<{tag} class="formula">{formula}</{tag}>'
