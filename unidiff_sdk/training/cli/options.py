"""Builders of command-line options: options that set a configuration field, and options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.cli.console import Option
from unidiff_sdk.cli.parameters import parse_pairs

__all__ = [
    "BASE_OPTIONS",
    "CONTEXT",
    "FILE",
    "FOLDER",
    "base_options",
    "columns_option",
    "config_option",
    "device_option",
    "flag",
    "option",
    "overwrite_option",
    "strict_option",
]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path)
BASE_OPTIONS = ("variant", "lora", "textual_inversion", "vae", "base_config")  # the parameters of `base_options`

Decorator = Callable[[Any], Any]


def option(*names: str, theme: str = "Options", **settings: Any) -> Decorator:
    """An option under a heading of the help. settings: as for `click.option`."""
    return click.option(*names, cls=Option, theme=theme, **settings)


def flag(name: str, *, theme: str = "Options", help: str) -> Decorator:
    """An option without a value."""
    return option(name, theme=theme, is_flag=True, help=help)


def config_option(
    name: str, config: type, field: str, *, help: str, theme: str = "Options", **settings: Any
) -> Decorator:
    """An option that sets a field of a configuration dataclass, with the field's default and type."""
    default = next(each.default for each in fields(config) if each.name == field)
    settings.setdefault("type", type(default))
    return option(name, field, theme=theme, default=default, show_default=True, help=help, **settings)


def strict_option(theme: str = "Options") -> Decorator:
    """--strict"""
    return flag("--strict", theme=theme, help="Fail on the first invalid row instead of skipping it.")


overwrite_option = flag("--overwrite", help="Replace the checkpoint in --out, if there is one.")


def columns_option(data: str = "DATA", theme: str = "Options") -> Decorator:
    """--columns"""
    return option(
        "--columns",
        theme=theme,
        callback=parse_pairs,
        metavar="ROLE=NAME,…",
        help=f"Names of columns of {data}: image=photo,text=title.",
    )


def base_options(theme: str = "Options") -> Decorator:
    """--variant, --lora, --textual-inversion, --vae and --base-config"""
    builders = (
        option("--variant", theme=theme, metavar="NAME", help="Variant of the base's weight files, such as fp16."),
        option(
            "--lora",
            theme=theme,
            multiple=True,
            metavar="PATH[:WEIGHT]",
            help="LoRA to merge into the base: a file of diffusers, peft or kohya, or a folder of peft. Repeatable.",
        ),
        option(
            "--textual-inversion",
            theme=theme,
            multiple=True,
            metavar="FILE[:TOKEN]",
            help="Token to add to prompts, as safetensors of diffusers or AUTOMATIC1111. Repeatable.",
        ),
        option("--vae", theme=theme, metavar="PATH", help="VAE to use: a diffusers folder, or a safetensors file."),
        option(
            "--base-config",
            theme=theme,
            metavar="FOLDER",
            help="Pipeline folder with the configuration of a single-file base. Default: Stable Diffusion 1.5.",
        ),
    )

    def add(command: Any) -> Any:
        for builder in reversed(builders):
            command = builder(command)
        return command

    return add


device_option = option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to compute on. auto: the GPU if there is one.",
)
