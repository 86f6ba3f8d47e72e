"""What the console scripts share: one-line errors and warnings, `-h` and `--version`, and examples in the help."""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from unidiff_sdk._internal.text import json_text, terminal_safe
from unidiff_sdk.errors import FilterError, OptionError, UniDiffError

__all__ = ["Command", "Group", "MainCommand", "Option", "echo", "echo_json"]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def echo(*lines: object, err: bool = False) -> None:
    """Print lines of text. Control characters and marks of text direction are escaped: captions come from outside.

    Every command prints with this function, `echo_json` or `terminal.print_table`.
    """
    for line in lines:
        click.echo(terminal_safe(line), err=err)


def echo_json(value: Any) -> None:
    """Print a value as JSON in one line."""
    click.echo(json_text(value))


def _show_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"unidiff-sdk {version('unidiff-sdk')}")
        ctx.exit()


@cache
def _version_option(hidden: bool) -> click.Option:
    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        hidden=hidden,
        help="Show the version and exit.",
    )


class Option(click.Option):
    """An option that is listed under its own heading in the help.

    Args:
        theme: the heading. Headings and their options are listed in the order of definition.
    """

    def __init__(self, *args: Any, theme: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.theme = theme


class _ScriptCommand(click.Command):
    """A command that prints an error in one line.

    It exits with 2 if an argument is invalid, with 1 after another error, with 130 after Ctrl-C and with 143 after
    SIGTERM.

    Args:
        resuming: what an interrupted run keeps and how to continue it, printed after an interrupt. Either a text, or a
            function of the context.
        epilog: examples, one per line.
    """

    def __init__(self, *args: Any, resuming: str | Callable[[click.Context], str] = "", **kwargs: Any) -> None:
        kwargs["context_settings"] = CONTEXT | (kwargs.get("context_settings") or {})
        super().__init__(*args, **kwargs)
        self.resuming = resuming

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _escape_output()
        with _one_line_warnings():
            try:
                return super().main(*args, **kwargs)
            except UniDiffError as error:
                echo(f"Error: {' '.join(str(error).split())}", err=True)
                sys.exit(2 if isinstance(error, OptionError | FilterError) else 1)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _safe_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _safe_usage_errors(), _terminated_as_interrupted():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            resuming = self.resuming if isinstance(self.resuming, str) else self.resuming(ctx)
            echo(f"Interrupted. {resuming}".strip(), err=True)
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            sys.exit(128 + int(number))

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters of the command, with `--version`. The help of a console script lists it."""
        *parameters, help_option = super().get_params(ctx)
        return [*parameters, _version_option(hidden=ctx.parent is not None), help_option]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options under the headings of their themes."""
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
        """Print the examples as they are written. click would wrap them into one paragraph."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


class Command(_ScriptCommand):
    """A console script without subcommands, or a subcommand."""


class MainCommand(Command):
    """A console script with a main command and further ones: `unidiff-train DATA …`, `unidiff-train distill …`.

    If the first argument is the name of another command, that command runs.

    Attributes:
        words: the arguments that it was called with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.others: dict[str, click.Command] = {}
        self.words: list[str] = []

    def add(self, command: click.Command) -> None:
        """Add another command under its own name."""
        self.others[str(command.name)] = command

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **kwargs: Any) -> Any:
        self.words = words = list(sys.argv[1:] if args is None else args)
        script = prog_name or Path(sys.argv[0]).name
        if words and words[0] in self.others:
            return self.others[words[0]].main(words[1:], f"{script} {words[0]}", *rest, **kwargs)
        return super().main(words, script, *rest, **kwargs)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.others:
            with formatter.section("Other commands"):
                formatter.write_dl([(name, command.get_short_help_str(80)) for name, command in self.others.items()])
        super().format_epilog(ctx, formatter)


class Group(_ScriptCommand, click.Group):
    """A console script with subcommands, listed in the order of definition. Subcommands are `Command`s by default."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print warnings in one line, without the position in the source code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: echo(f"Warning: {message}", err=True)
        yield


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, with which schedulers and containers end a process, interrupt a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _safe_usage_errors() -> Iterator[None]:
    """Escape the arguments that click quotes in its errors: `unidiff … *` passes file names from outside."""
    try:
        yield
    except click.ClickException as error:
        error.message = terminal_safe(error.message)  # type: ignore[misc]
        raise


def _escape_output() -> None:
    """Escape what the terminal cannot encode, and the messages in the traceback of an error that is a bug."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = lambda kind, error, trace: echo(
            *"".join(traceback.format_exception(kind, error, trace)).splitlines(), err=True
        )
