"""The layout of the packages: imports run one way, without a cycle, and no folder grows beyond ten modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"unidiff_sdk": ROOT / "unidiff_sdk", "unidiff_export": ROOT / "export" / "unidiff_export"}
LARGEST_FOLDER = 10

# What each package of the runtime may import from the others. `_internal` and `errors` are open to all.
ALLOWED = {
    "_internal": set(),
    "store": set(),
    "inference": set(),
    "datasets": set(),
    "retrieval": {"inference", "store"},
    "generation": {"inference"},
    "catalog": {"retrieval", "generation", "inference", "store", "datasets"},
    "serve": {"catalog", "retrieval", "generation", "inference", "store"},
    "scale": {"catalog", "retrieval", "generation", "inference", "store", "datasets"},
    "cli": {"serve", "scale", "catalog", "retrieval", "generation", "inference", "store", "datasets"},
    "__main__": {"cli"},
}
# The same within `training`, from the lowest to the highest: a package imports only those before it.
TRAINING = [
    "config",
    "runtime",
    "checkpoints",
    "objective",
    "data",
    "evaluation",
    "loop",
    "reporting",
    "recipes",
    "cli",
]


def module_files() -> dict[str, Path]:
    """Every module by its dotted name."""
    return {
        ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): file
        for package, folder in SOURCES.items()
        for file in folder.rglob("*.py")
    }


MODULES = module_files()


def imports(module: str) -> set[str]:
    """The modules of this project that a module imports, also in functions. Type-only imports do not count."""
    found: set[str] = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found.update(name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return (found & MODULES.keys()) - {module}


def part_of(module: str) -> str:
    """The package below `unidiff_sdk` that a module belongs to; "" for the top level and for the export package."""
    return module.split(".")[1] if module.startswith("unidiff_sdk.") else ""


@pytest.mark.parametrize("module", sorted(name for name in MODULES if part_of(name) in ALLOWED))
def test_the_runtime_imports_one_way(module: str) -> None:
    open_to_all = {part_of(module), "_internal", "errors"}
    assert {part_of(name) for name in imports(module)} - open_to_all <= ALLOWED[part_of(module)]


def test_every_package_has_a_rule() -> None:
    assert {part_of(name) for name in MODULES} == {"", "errors", "models", "training", *ALLOWED} - {"models"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("unidiff_sdk.training.")))
def test_training_imports_one_way(module: str) -> None:
    rank = TRAINING.index(module.split(".")[2])
    assert not [name for name in imports(module) if name.startswith("unidiff_export")]
    within = [name.split(".")[2] for name in imports(module) if name.startswith("unidiff_sdk.training.")]
    assert {name for name in within if TRAINING.index(name) > rank} == set()


def test_no_import_cycle() -> None:
    graph = {module: imports(module) for module in MODULES}
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                follow(imported, (*path, module))
            done.add(module)

    for module in sorted(graph):
        follow(module, ())


def test_no_folder_outgrows_its_idea() -> None:
    for package, folder in SOURCES.items():
        for place in [folder, *(path for path in folder.rglob("*") if path.is_dir() and list(path.glob("*.py")))]:
            entries = {
                entry.name
                for entry in place.iterdir()
                if entry.suffix in {".py", ""} and entry.name not in {"__init__.py", "__pycache__"}
            }
            # The top level holds `errors`, `__main__`, `models` and `_internal` besides a package for each concern.
            limit = LARGEST_FOLDER + (4 if place == SOURCES["unidiff_sdk"] else 0)
            assert len(entries) <= limit, f"{package}: {place.name} holds {len(entries)}: {', '.join(sorted(entries))}"
