"""Pages and images that live elsewhere in the repository: shown where they are, without a copy in docs/."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SHOWN = (
    "CHANGELOG.md",
    "benchmarks/*.md",
    "benchmarks/plots/*.svg",
    "benchmarks/quality/**/*.*",
    "examples/images/*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files at the same relative paths, so that the links between them hold."""
    for pattern in SHOWN:
        for file in sorted(ROOT.glob(pattern)):
            path = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, path, abs_src_path=str(file)))
    return files
