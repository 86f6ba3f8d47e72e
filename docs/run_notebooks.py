"""Run the notebooks of the documentation and save their outputs: `python docs/run_notebooks.py [NOTEBOOK…]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent / "notebooks"
TIMEOUT = 1800  # seconds a cell may take


def run(file: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a temporary folder; without counters, and without what goes to stderr.

    Raises nbclient.exceptions.CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=TIMEOUT, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
    return notebook


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb"))):
        nbformat.write(run(file), file)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
