"""Identify the code that a row was measured with: a digest of the abstract syntax that a benchmark runs.

The digest covers the benchmark's script and every project module that it imports, directly or through others. Modules
are parsed, never imported. A row becomes stale when the code that it ran changes, and stays valid when only a sentence
does. These do not count:

- comments, docstrings, error messages and `help=` texts;
- type annotations, `if TYPE_CHECKING` blocks and `__all__`;
- the module that a definition is in, and the imports that follow from it, packages' `__init__.py` included;
- the bookkeeping of the benchmarks: what decides a figure there (rounds, threads, versions) is stored with the row.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The folders that project imports start from.
SOURCES = (".", "export", "benchmarks")
BOOKKEEPING = ("harness.py", "provenance.py", "_host.py")
FOR_ANNOTATIONS = ("__future__", "collections.abc", "typing")


def digest(files: Sequence[Path], root: Path = ROOT) -> str:
    """Return a short hash of the code that runs when `files` do: 16 hexadecimal digits."""
    whole = hashlib.sha256()
    sources = (file.read_text(encoding="utf-8") for file in modules(files, root))
    for statement in sorted({text for source in sources for text in statements(source, root)}):
        whole.update(statement.encode() + b"\n")
    return whole.hexdigest()[:16]


def code_of(benchmark: str, depends: Sequence[str] = (), root: Path = ROOT) -> str | None:
    """Return the digest of a benchmark's code today, or None if one of its files is gone.

    Args:
        benchmark: the name of its script.
        depends: the scripts that it starts as processes, relative to `root`.
    """
    files = [root / "benchmarks" / f"{benchmark}.py", *(root / name for name in depends)]
    return digest(files, root) if all(file.is_file() for file in files) else None


def modules(files: Sequence[Path], root: Path = ROOT) -> list[Path]:
    """Return `files` and the project modules that they import, directly or through others, without the bookkeeping."""
    found: set[Path] = set()
    waiting = [file.resolve() for file in files]
    while waiting:
        file = waiting.pop()
        if file not in found and file.name not in BOOKKEEPING:
            found.add(file)
            waiting += imported_modules(file, root)
    return sorted(found)


@cache
def statements(source: str, root: Path) -> tuple[str, ...]:
    """Return the top-level statements of a module's source, each as the text of its abstract syntax."""
    tree = _Executed(root).visit(ast.parse(source))
    return tuple(_text(statement) for statement in tree.body)


class _Executed(ast.NodeTransformer):
    """Remove what is written for readers and type checkers, and imports of project modules."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        documentation = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if documentation else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func  # the class without its message
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if _for_type_checkers(node) else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if _text(node.targets) == _text([ast.Name("__all__", ast.Store())]) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.generic_visit(ast.Assign([node.target], node.value))

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> list[ast.Import]:
        return [ast.Import([alias]) for alias in node.names if not _find(alias.name, self._root)]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        if node.level or _find(node.module or "", self._root):
            return [ast.ImportFrom(None, [alias], 0) for alias in node.names if alias.asname not in (None, alias.name)]
        return [ast.ImportFrom(node.module, [alias], 0) for alias in node.names if node.module not in FOR_ANNOTATIONS]


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _text(node: object) -> str:
    """Abstract syntax as text. Empty fields are left out, since Python versions differ in those that they have."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_text, node))}]"
    return repr(node)


# --- imports ---------------------------------------------------------------------------------------------------------


class Imported(NamedTuple):
    """One name of an import statement: `from module import name as bound`, or `import module` without a name."""

    level: int  # the number of leading dots
    module: str
    name: str | None
    bound: str | None


def imported_modules(file: Path, root: Path) -> Iterator[Path]:
    """Yield the project modules that a module imports anywhere in it, except for type checkers alone."""
    for one in _imports(file.read_text(encoding="utf-8")):
        package = _package(one, file, root)
        found = _find(package, root) if one.name is None else _origin(package, one.name, root)
        if found is not None and found.name != "__init__.py":
            yield found


@cache
def _imports(source: str, *, type_checking: bool = False) -> tuple[Imported, ...]:
    found: list[Imported] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend(Imported(0, alias.name, None, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.extend(Imported(node.level, node.module or "", a.name, a.asname or a.name) for a in node.names)
        elif type_checking or not _for_type_checkers(node):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return tuple(found)


def _package(one: Imported, file: Path, root: Path) -> str:
    """Return the absolute name of the module that an import of `file` names."""
    if not one.level:
        return one.module
    folder = file.parents[one.level - 1]
    source = next(root / source for source in reversed(SOURCES) if folder.is_relative_to(root / source))
    return ".".join([*folder.relative_to(source).parts, *filter(None, [one.module])])


def _origin(package: str, name: str, root: Path) -> Path | None:
    """Return the file that `from package import name` refers to, through the `__init__.py` of packages."""
    if module := _find(f"{package}.{name}", root):
        return module
    file = _find(package, root)
    if file is None or file.name != "__init__.py":
        return file
    for one in _imports(file.read_text(encoding="utf-8"), type_checking=True):  # lazy imports stand there
        if one.bound == name:
            return _origin(_package(one, file, root), one.name or "", root)
    return None


def _find(name: str, root: Path) -> Path | None:
    """Return the file of the project module `name`, or None."""
    for source in SOURCES:
        path = (root / source).joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.resolve()
    return None
