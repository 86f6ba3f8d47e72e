"""The command-line reference, from the commands themselves: `::: cli NAME` becomes the help of a console script."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
DEEPEST_HEADING = 4  # smaller ones are hard to read

_PLACE = re.compile(r"^::: cli (\S+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each `::: cli NAME` by a section for that console script and one for each of its commands."""
    return _PLACE.sub(lambda found: "\n".join(_script(found[1])), markdown)


def _script(name: str) -> Iterator[str]:
    module, attribute = SCRIPTS[name].split(":")
    yield from _section(getattr(import_module(module), attribute), name, level=2)


def _section(command: click.Command, name: str, level: int, parent: click.Context | None = None) -> Iterator[str]:
    context = click.Context(command, parent, info_name=name, **command.context_settings)
    yield f"{'#' * min(level, DEEPEST_HEADING)} `{name}` {{#{name.replace(' ', '-')}}}\n"
    yield f"```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    for heading, options in _options(command, context).items():
        yield f"| {heading} | |\n|---|---|"
        yield from (f"| {_code(declaration)} | {_cell(text)} |" for declaration, text in options)
        yield ""
    if command.epilog:
        yield f"```bash\n{inspect.cleandoc(command.epilog)}\n```\n"
    for child, other in _children(command, context):
        yield from _section(other, f"{name} {child}", level + 1, context if isinstance(command, click.Group) else None)


def _options(command: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    """(declaration, help) of each option, under the headings that `--help` has."""
    themes: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option) and "--help" not in parameter.opts:
            themes.setdefault(getattr(parameter, "theme", "Options"), []).append(record)
    return themes


def _children(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """The commands of a group, and those that stand next to a main command."""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield name, child
    yield from getattr(command, "others", {}).items()


def _code(declaration: str) -> str:
    return f"`{_cell(declaration)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
