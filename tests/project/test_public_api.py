"""The public names, signatures and command-line options are those that public_api.txt records.

After an intended change, run `python tests/project/test_public_api.py` and commit the updated record together with an
entry in CHANGELOG.md. CONTRIBUTING.md describes how to deprecate a name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

import unidiff_sdk

RECORD = Path(__file__).with_name("public_api.txt")
ROOT = Path(__file__).parents[2]
HINT = "docs/stability.md states what may change. If this change is intended: python tests/project/test_public_api.py"


def public_api() -> str:
    """The public API as text: a heading for each module or command, and one line for each name and parameter."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = ["# unidiff_sdk"]
    for name in sorted(unidiff_sdk.__all__):
        lines += describe(name, getattr(unidiff_sdk, name))
    for module, names in documented().items():
        lines += ["", f"# {module}"]
        lines += (line for name in names for line in describe(name, getattr(import_module(module), name)))
    for script, target in project["scripts"].items():
        module, _, function = target.partition(":")
        lines += ["", f"# {script}", *commands(script, getattr(import_module(module), function))]
    return "\n".join(lines) + "\n"


def documented() -> dict[str, list[str]]:
    """The names of other modules than `unidiff_sdk` itself that the reference pages document."""
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    found: dict[str, list[str]] = {}
    for module, name in sorted(re.findall(r"^::: (?!unidiff_sdk\.\w+$)([\w.]+)\.(\w+)$", pages, re.MULTILINE)):
        found.setdefault(module, []).append(name)
    return found


def describe(name: str, value: Any) -> Iterator[str]:
    """A public name: the parameters of a class or function, and the public members of a class."""
    if not callable(value):
        yield f"{name}: {type(value).__name__}"
        return
    if not inspect.isclass(value):
        yield f"{name}{returns(value)}"
        yield from parameters(value)
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {name}{f'({bases})' if bases else ''}"
    yield from parameters(value)
    fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    for member in sorted(member for member in {*dir(value)} - fields if not member.startswith("_")):
        yield from describe_member(value, member)


def describe_member(owner: type, name: str) -> Iterator[str]:
    """A method, property or attribute that a class of this project defines; nothing for those of its built-in bases."""
    definer = next(base for base in owner.__mro__ if name in vars(base))
    if definer.__module__.split(".")[0] != "unidiff_sdk":
        return
    raw = vars(definer)[name]
    if isinstance(raw, (staticmethod, classmethod)) or inspect.isroutine(raw):
        yield from describe(f"{owner.__name__}.{name}", getattr(owner, name))
    else:
        yield f"{owner.__name__}.{name}: {'property' if isinstance(raw, property) else 'attribute'}"


def returns(function: Any) -> str:
    annotation = inspect.signature(function).return_annotation
    return "()" if annotation is inspect.Signature.empty else f"() -> {shown(annotation)}"


def parameters(value: Any) -> Iterator[str]:
    """One line for each public parameter but self."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # a class that is built in, such as an exception without an __init__ of its own
        return
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.name == "self" or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "    *"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {shown(parameter.annotation)}"
        given = getattr(parameter.default, "__name__", repr(parameter.default))  # a function by name, not by address
        default = "" if parameter.default is parameter.empty else f" = {given}"
        yield f"    {stars}{parameter.name}{annotation}{default}"


def shown(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def commands(path: str, command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """A command with its arguments and options except --help, and its subcommands."""
    context = click.Context(command, parent, **command.context_settings)
    own = [parameter for parameter in command.get_params(context) if "--help" not in parameter.opts]
    arguments = [parameter for parameter in own if isinstance(parameter, click.Argument)]
    yield " ".join([path, *(argument.make_metavar(context) for argument in arguments)])
    for option in sorted((p for p in own if isinstance(p, click.Option)), key=lambda option: option.opts):
        names = ", ".join([*option.opts, *option.secondary_opts])
        kind = "flag" if option.is_flag else option.type.name
        yield f"    {names}: {kind}{', repeatable' if option.multiple else ''}"
    for name, sub in sorted(getattr(command, "commands", {}).items()):
        yield from commands(f"{path} {name}", sub, context)
    for name, other in sorted(getattr(command, "others", {}).items()):
        yield from commands(f"{path} {name}", other)


def test_the_public_api_is_the_recorded_one() -> None:
    pytest.importorskip("onnxscript", reason="the training and export API needs the export extra")
    recorded, current = RECORD.read_text(encoding="utf-8"), public_api()
    changes = difflib.unified_diff(recorded.splitlines(), current.splitlines(), "recorded", "current", "", "", 0, "")
    assert current == recorded, "\n".join(["The public API has changed.", *changes, HINT])


if __name__ == "__main__":
    RECORD.write_text(public_api(), encoding="utf-8")
    print(f"{RECORD.relative_to(ROOT)} is up to date.")
