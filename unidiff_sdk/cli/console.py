"""What the console scripts share: errors in one line, examples under the help."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.errors import UniDiffError

__all__ = ["Command", "Group", "MainCommand", "Option"]


class Option(click.Option):
    """An option under a heading of its own in the help. theme: the heading; options are listed in their order."""

    def __init__(self, *args: Any, theme: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.theme = theme


class _Polite(click.Command):
    """A command that ends a refused run with one line on stderr and exit code 1, and an interrupted one with 130.

    keeps: whether what an interrupted run has finished is there afterwards, which it then says.
    """

    def __init__(self, *args: Any, keeps: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keeps = keeps

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line_warnings():
            try:
                return super().main(*args, **kwargs)
            except UniDiffError as error:
                click.echo(f"Error: {' '.join(str(error).split())}", err=True)
                sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted." + " What was finished is kept." * self.keeps, err=True)
            sys.exit(130)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by theme, as listing them all under one heading would bury the few that most need."""
        themes: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                themes.setdefault(getattr(parameter, "theme", "Options"), []).append(record)
        for theme, records in themes.items():
            with formatter.section(theme):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, as they are written: click would wrap them into one paragraph."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


class CatalogFolder(click.Path):
    """The folder of a catalog; a URL, of which a path would make a folder of that name, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).startswith(("http://", "https://")):
            self.fail(f"{value} is a URL, and commands work on folders; in Python, Catalog(url, images=…) opens it")
        return super().convert(value, param, ctx)


class Command(_Polite):
    """A console script of one command; `epilog` holds its examples, one a line."""


class MainCommand(Command):
    """A console script of one command that has others beside it: `unidiff-train DATA …`, `unidiff-train distill …`.

    The first word chooses; what is no name of another command is the main one's first argument.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.others: dict[str, click.Command] = {}

    def add(self, command: click.Command) -> None:
        """Put a command beside this one, under its own name."""
        self.others[str(command.name)] = command

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **kwargs: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        script = prog_name or Path(sys.argv[0]).name
        if words and words[0] in self.others:
            return self.others[words[0]].main(words[1:], f"{script} {words[0]}", *rest, **kwargs)
        return super().main(words, script, *rest, **kwargs)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Other commands"):
            formatter.write_dl([(name, command.get_short_help_str(80)) for name, command in self.others.items()])
        super().format_epilog(ctx, formatter)


class Group(_Polite, click.Group):
    """A console script of several commands; those are `Command`s by default."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of their definition, which is the order of use


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings as a sentence for users instead of a place in the source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Note: {message}", err=True)
        yield
