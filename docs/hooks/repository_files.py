"""Pages and images that live elsewhere in the repository: shown where they are, without a copy in docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SHOWN = (
    "*.md",
    "LICENSE",
    "benchmarks/*.md",
    "benchmarks/plots/*.svg",
    "benchmarks/quality/**/*.*",
    "examples/images/*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files at the same relative paths, so that the links between them hold."""
    for pattern in SHOWN:
        for file in sorted(set(ROOT.glob(pattern)) - {ROOT / "README.md"}):  # docs/index.md takes its place
            path = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, path, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """In the files at the root of the repository, links into docs/ become links within the site."""
    return markdown.replace("](docs/", "](") if (ROOT / page.file.src_uri).is_file() else markdown
