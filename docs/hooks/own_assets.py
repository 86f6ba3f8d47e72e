"""A built page loads nothing from another host: no fonts, scripts, styles or images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

# Links (<a href>) may lead elsewhere; what a browser fetches by itself may not.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\ssrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b[^>]*\shref=["']?(?:https?:)?//[^>]*>"""
    r"""|(?:@import\s+|url\()["']?(?:https?:)?//[^)\s]+""",
    re.IGNORECASE,
)


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Fail the build at the first page or stylesheet that would load something from another host."""
    for file in sorted(Path(config.site_dir).rglob("*")):
        if file.suffix in (".html", ".css") and (found := _FETCHED.search(file.read_text(encoding="utf-8"))):
            raise PluginError(f"{file.relative_to(config.site_dir)} loads from another host: {found[0]}")
