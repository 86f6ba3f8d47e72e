"""`unidiff dataset`: draw a synthetic catalog, or convert a public set of product pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .console import Group

if TYPE_CHECKING:
    from unidiff_sdk.datasets.convert import Converted

__all__ = ["dataset"]

SHOWN_BAD = 5


class _DrawUnlessNamed(Group):
    """`unidiff dataset fashion-man OUT` is short for `unidiff dataset draw fashion-man OUT`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["draw", *args])


@click.group(
    cls=_DrawUnlessNamed,
    short_help="Draw a synthetic catalog, or convert a public one.",
    context_settings={"ignore_unknown_options": True},
    subcommand_metavar="NAME OUT [OPTIONS] | COMMAND [ARGS]...",
    epilog="""
    unidiff dataset fashion-man shirts --n 400
    unidiff dataset ecommerce-product unseen --split test-unseen --size 128
    unidiff dataset convert deepfashion-multimodal downloads/deepfashion women --gender women
    """,
)
def dataset() -> None:
    """Make a catalog folder to try things on: `draw` a synthetic one, or `convert` a public set.

    NAME OUT alone draws the synthetic catalog NAME: fashion-man, fashion-woman or ecommerce-product.
    """


@dataset.command(
    short_help="Draw a synthetic catalog.",
    epilog="""
    unidiff dataset draw fashion-man shirts --n 400
    unidiff dataset draw ecommerce-product unseen --split test-unseen --size 128
    """,
)
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--n", default=400, show_default=True, type=click.IntRange(min=1), help="How many products.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same products.")
@click.option("--split", default="train", show_default=True, help="train, val, test, or test-unseen.")
@click.option("--size", default=64, show_default=True, help="Side of the pictures in pixels.")
def draw(name: str, out: Path, n: int, seed: int, split: str, size: int) -> None:
    """Draw the synthetic catalog NAME into the folder OUT: fashion-man, fashion-woman or ecommerce-product."""
    from unidiff_sdk.datasets.synthetic import write_catalog

    write_catalog(name, out, n=n, seed=seed, split=split, size=size)
    click.echo(f"{n:,} synthetic products of {name} ({split}) are in {out}. Next: unidiff index {out} CATALOG")


@dataset.group(
    cls=Group,
    short_help="Turn a downloaded public set into catalog folders.",
    epilog="""
    unidiff dataset convert deepfashion-multimodal downloads/deepfashion men --gender men --n 200
    unidiff dataset convert m5product downloads/m5product products
    """,
)
def convert() -> None:
    """Turn a downloaded public set into OUT/train, OUT/val and OUT/test, with splits that anyone can repeat."""


def _options(command: Any) -> Any:
    for option in (
        click.option("--strict", is_flag=True, help="Stop at the first pair that cannot be used."),
        click.option("--n", type=click.IntRange(min=1), help="Pairs of train, chosen by the seed; default: all."),
        click.option("--seed", default=0, show_default=True, help="Of the splits; 0 is the published one."),
        click.argument("out", type=click.Path(path_type=Path)),
        click.argument("src", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@convert.command(
    "deepfashion-multimodal",
    short_help="Men's or women's fashion, with captions.",
    epilog="unidiff dataset convert deepfashion-multimodal downloads/deepfashion women --gender women",
)
@_options
@click.option("--gender", required=True, type=click.Choice(["men", "women"]), help="Whose pictures.")
def deepfashion_multimodal(src: Path, out: Path, gender: Literal["men", "women"], **settings: Any) -> None:
    """Convert DeepFashion-MultiModal: SRC holds its images/, captions.json and labels/. No garment is in two splits."""
    from unidiff_sdk.datasets.convert import convert, deepfashion_multimodal

    name = f"deepfashion-multimodal, {gender}"
    _tell(convert(deepfashion_multimodal(src, gender), out, source=name, **settings), out)


@convert.command(
    short_help="E-commerce products, with Chinese titles.",
    epilog="unidiff dataset convert m5product downloads/m5product products --n 1000",
)
@_options
def m5product(src: Path, out: Path, **settings: Any) -> None:
    """Convert M5Product: SRC holds product1m_product5m_id_label.json and images/ID.jpg of the products wanted."""
    from unidiff_sdk.datasets.convert import convert, m5product

    _tell(convert(m5product(src), out, source="m5product", **settings), out)


def _tell(converted: Converted, out: Path) -> None:
    for row in converted.invalid[:SHOWN_BAD]:
        click.echo(f"Passed over: {row}", err=True)
    if len(converted.invalid) > SHOWN_BAD:
        click.echo(f"… and {len(converted.invalid) - SHOWN_BAD:,} more.", err=True)
    counts = ", ".join(f"{count:,} {split}" for split, count in converted.counts.items())
    click.echo(f"{counts} pairs are in {out}. Next: unidiff-train {out / 'train'} --base tiny -o CKPT")
