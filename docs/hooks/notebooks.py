"""Notebooks as pages: text and code as they are, results as they were saved. Nothing runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook of the documentation."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        content = json.loads(Path(str(notebook.abs_src_path)).read_text(encoding="utf-8"))
        name = Path(notebook.src_uri).name
        note = f"This page is a notebook: [{name}]({name}).\n"
        cells = [part for cell in content["cells"] for part in _cell(cell)]
        page = "\n\n".join([cells[0], note, *cells[1:]])
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=page + "\n"))
    return files


def _cell(cell: Mapping[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
    elif cell["cell_type"] == "code":
        yield f"```python\n{source}\n```"
        yield from (shown for output in cell["outputs"] if (shown := _output(output)))


def _output(output: Mapping[str, Any]) -> str:
    """The richest form that a page can show; what a notebook prints to its error stream is left out."""
    data: Mapping[str, Any] = output.get("data", {})
    if output["output_type"] == "stream":
        data = {"text/plain": output["text"]} if output["name"] == "stdout" else {}
    if "text/html" in data:
        return f'<div class="notebook-output">{"".join(data["text/html"]).strip()}</div>'
    if "image/png" in data:
        return f'<img class="notebook-output" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/plain" in data:
        return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
    return ""
