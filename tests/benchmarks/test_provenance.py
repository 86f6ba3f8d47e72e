"""The digest of a row changes with the code that the benchmark runs, and with nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from provenance import BOOKKEEPING, ROOT, code_of, digest, modules

TREE = {
    "benchmarks/speed.py": '''
"""How fast is it?"""
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy as np
from harness import Benchmark
if TYPE_CHECKING:
    from unidiff_sdk.types import Vector

def main() -> None:
    """Measure."""
    from helper import data
    from unidiff_sdk import Catalog
    Benchmark("speed").row(lambda: Catalog(data()).search(np.zeros(3)))
''',
    "benchmarks/harness.py": "class Benchmark: ROUNDS = 7",
    "benchmarks/helper.py": """
import unidiff_export.graphs.lowering as lowering

def data():
    return lowering.lower()
""",
    "benchmarks/peer.py": "LINKS = 16\n",
    "unidiff_sdk/__init__.py": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .catalog.catalog import Catalog as Catalog
_HOME = {"Catalog": "catalog.catalog"}
""",
    "unidiff_sdk/types.py": "Vector = list\n",
    "unidiff_sdk/unrelated.py": "VALUE = 1\n",
    "unidiff_sdk/catalog/__init__.py": "",
    "unidiff_sdk/catalog/catalog.py": '''
from ..kernels import scan
__all__ = ["Catalog"]

class Catalog:
    """Search."""

    def search(self, query: object) -> object:
        # Scan all.
        if query is None:
            raise ValueError(f"query is {query!r}; pass a vector")
        return scan(query, 64)
''',
    "unidiff_sdk/kernels.py": "def scan(query, block: int = 8):\n    return query * block * 0.5\n",
    "export/unidiff_export/__init__.py": "",
    "export/unidiff_export/graphs/__init__.py": "",
    "export/unidiff_export/graphs/lowering.py": """
from . import passes as graph_passes
OPSET = 23

def lower():
    return graph_passes.LEVEL
""",
    "export/unidiff_export/graphs/passes.py": "LEVEL = 3\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def edit(tree: Path, name: str, old: str, new: str) -> None:
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))


def test_digest_follows_lazy_relative_and_nested_imports(tree: Path) -> None:
    found = {file.relative_to(tree).as_posix() for file in modules([tree / "benchmarks" / "speed.py"], tree)}
    assert found == {
        "benchmarks/speed.py",
        "benchmarks/helper.py",
        "unidiff_sdk/catalog/catalog.py",
        "unidiff_sdk/kernels.py",
        "export/unidiff_export/graphs/lowering.py",
        "export/unidiff_export/graphs/passes.py",
    }


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("benchmarks/speed.py", "How fast is it?", "The time of one search."),
        ("benchmarks/speed.py", "-> None", "-> object"),
        ("benchmarks/harness.py", "7", "9"),
        ("unidiff_sdk/catalog/catalog.py", "# Scan all.", "# Every vector is compared."),
        ("unidiff_sdk/catalog/catalog.py", '"""Search."""', '"""Find the nearest vectors."""'),
        ("unidiff_sdk/catalog/catalog.py", "pass a vector", "give float32[dim]"),
        ("unidiff_sdk/catalog/catalog.py", '["Catalog"]', '["Catalog", "More"]'),
        ("unidiff_sdk/kernels.py", "block: int", "block: float"),
        ("unidiff_sdk/unrelated.py", "1", "2"),
        ("unidiff_sdk/types.py", "list", "tuple"),
        ("unidiff_sdk/__init__.py", "_HOME = {", '_HOME = {"Bundle": "bundle", '),
    ],
)
def test_digest_keeps_its_value_where_no_measured_code_changes(tree: Path, name: str, old: str, new: str) -> None:
    before = code_of("speed", root=tree)
    edit(tree, name, old, new)
    assert code_of("speed", root=tree) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("benchmarks/speed.py", "zeros(3)", "zeros(4)"),
        ("benchmarks/speed.py", "import numpy as np", "import cupy as np"),
        ("benchmarks/peer.py", "16", "32"),
        ("unidiff_sdk/catalog/catalog.py", "64", "128"),
        ("unidiff_sdk/catalog/catalog.py", "raise ValueError", "raise KeyError"),
        ("unidiff_sdk/kernels.py", "0.5", "0.25"),
        ("unidiff_sdk/kernels.py", "block: int = 8", "block: int = 16"),
        ("export/unidiff_export/graphs/passes.py", "3", "2"),
    ],
)
def test_digest_changes_with_the_code_that_is_measured(tree: Path, name: str, old: str, new: str) -> None:
    before = code_of("speed", ["benchmarks/peer.py"], tree)
    edit(tree, name, old, new)
    assert code_of("speed", ["benchmarks/peer.py"], tree) != before


def test_digest_keeps_its_value_when_a_module_moves(tree: Path) -> None:
    before = code_of("speed", root=tree)
    (tree / "unidiff_sdk" / "kernels.py").rename(tree / "unidiff_sdk" / "catalog" / "scanning.py")
    edit(tree, "unidiff_sdk/catalog/catalog.py", "from ..kernels import", "from .scanning import")
    assert code_of("speed", root=tree) == before


def test_code_of_a_benchmark_without_its_script_matches_no_row(tree: Path) -> None:
    assert code_of("gone", root=tree) is None
    assert code_of("speed", ["benchmarks/gone.py"], tree) is None


def test_digest_covers_the_modules_of_this_repository() -> None:
    found = {file.relative_to(ROOT).as_posix() for file in modules([ROOT / "benchmarks" / "unet.py"])}
    assert {
        "benchmarks/sd15.py",
        "export/unidiff_export/graphs/lowering.py",
        "unidiff_sdk/inference/sessions.py",
    } < found
    assert not {f"benchmarks/{name}" for name in BOOKKEEPING} & found
    assert digest([ROOT / "benchmarks" / "unet.py"]) != digest([ROOT / "benchmarks" / "search.py"])
