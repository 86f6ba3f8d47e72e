"""`unidiff dataset`: render a synthetic catalog, or convert a public dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from unidiff_sdk.cli.console import Command, Group, echo

if TYPE_CHECKING:
    from unidiff_sdk.datasets.convert import Converted

__all__ = ["dataset"]

LISTED_PROBLEMS = 5  # kinds of invalid rows that are printed


class _RenderByDefault(Group):
    """`unidiff dataset fashion-man OUT` is short for `unidiff dataset render fashion-man OUT`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["render", *args])


@click.group(
    cls=_RenderByDefault,
    short_help="Render a synthetic catalog, or convert a public dataset.",
    context_settings={"ignore_unknown_options": True},
    subcommand_metavar="NAME OUT [OPTIONS] | COMMAND [ARGS]...",
    epilog="""
    unidiff dataset fashion-man shirts --n 400
    unidiff dataset ecommerce-product unseen --split test-unseen --size 128
    unidiff dataset convert deepfashion-multimodal downloads women --gender women
    """,
)
def dataset() -> None:
    """Create a folder of product images: `render` a synthetic catalog, or `convert` a public dataset.

    NAME OUT without a command renders the synthetic catalog NAME: fashion-man, fashion-woman or ecommerce-product.
    """


@dataset.command(
    short_help="Render a synthetic catalog.",
    epilog="""
    unidiff dataset render fashion-man shirts --n 400
    unidiff dataset render ecommerce-product unseen --split test-unseen --size 128
    """,
)
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--n", default=400, show_default=True, type=click.IntRange(min=1), help="Number of products.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same products.")
@click.option("--split", default="train", show_default=True, help="train, val, test or test-unseen.")
@click.option("--size", default=64, show_default=True, help="Width and height of the images in pixels, 64 to 512.")
def render(name: str, out: Path, n: int, seed: int, split: str, size: int) -> None:
    """Render the synthetic catalog NAME to the folder OUT: fashion-man, fashion-woman or ecommerce-product."""
    from unidiff_sdk.datasets.synthetic import write_catalog

    write_catalog(name, out, n=n, seed=seed, split=split, size=size)
    echo(f"{n:,} synthetic products of {name} ({split}) written to {out}. Next: unidiff index {out} CATALOG")


@dataset.group(
    cls=Group,
    short_help="Convert a downloaded public dataset.",
    epilog="""
    unidiff dataset convert deepfashion-multimodal downloads men --gender men
    unidiff dataset convert m5product downloads products --n 1000
    """,
)
def convert() -> None:
    """Convert a downloaded public dataset to OUT/train, OUT/val and OUT/test, with reproducible splits."""


def _convert_options(command: Any) -> Any:
    for option in (
        click.option("--strict", is_flag=True, help="Fail on the first invalid pair instead of skipping it."),
        click.option("--n", type=click.IntRange(min=1), help="Number of training pairs to keep. Default: all."),
        click.option("--seed", default=0, show_default=True, help="Seed of the splits; 0: the published one."),
        click.argument("out", type=click.Path(path_type=Path)),
        click.argument("src", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@convert.command(
    "deepfashion-multimodal",
    cls=Command,
    short_help="Fashion images of men or women, with captions.",
    epilog="unidiff dataset convert deepfashion-multimodal downloads women --gender women",
)
@_convert_options
@click.option("--gender", required=True, type=click.Choice(["men", "women"]), help="Images to convert.")
def deepfashion_multimodal(src: Path, out: Path, gender: Literal["men", "women"], **options: Any) -> None:
    """Convert DeepFashion-MultiModal. SRC contains its images/, captions.json and labels/.

    All images of a garment are in the same split.
    """
    from unidiff_sdk.datasets.convert import convert, deepfashion_multimodal

    name = f"deepfashion-multimodal, {gender}"
    _report(convert(deepfashion_multimodal(src, gender), out, source=name, **options), out)


@convert.command(
    cls=Command,
    short_help="E-commerce products, with Chinese titles.",
    epilog="unidiff dataset convert m5product downloads products --n 1000",
)
@_convert_options
def m5product(src: Path, out: Path, **options: Any) -> None:
    """Convert M5Product. SRC contains product1m_product5m_id_label.json and images/ID.jpg for the products to keep."""
    from unidiff_sdk.datasets.convert import convert, m5product

    _report(convert(m5product(src), out, source="m5product", **options), out)


@convert.command(
    cls=Command,
    short_help="Women's fashion with short descriptions.",
    epilog="unidiff dataset convert fashion200k downloads/fashion200k fashion",
)
@_convert_options
def fashion200k(src: Path, out: Path, **options: Any) -> None:
    """Convert Fashion200k. SRC contains its labels/ and women/."""
    from unidiff_sdk.datasets.convert import convert, fashion200k

    _report(convert(fashion200k(src), out, source="fashion200k", **options), out)


@convert.command(
    "deepfashion-inshop",
    cls=Command,
    short_help="Views of fashion products, with the shop's descriptions.",
    epilog="unidiff dataset convert deepfashion-inshop downloads/In-shop fashion",
)
@_convert_options
def deepfashion_inshop(src: Path, out: Path, **options: Any) -> None:
    """Convert the In-shop Clothes Retrieval Benchmark of DeepFashion. SRC contains its Anno/, Eval/ and Img/img/.

    All images of a product are in the same split.
    """
    from unidiff_sdk.datasets.convert import convert, deepfashion_inshop

    _report(convert(deepfashion_inshop(src), out, source="deepfashion-inshop", **options), out)


@convert.command(
    "fashion-iq",
    cls=Command,
    short_help="Fashion with captions that compare it with another image.",
    epilog="unidiff dataset convert fashion-iq downloads/fashion-iq fashion",
)
@_convert_options
def fashion_iq(src: Path, out: Path, **options: Any) -> None:
    """Convert FashionIQ. SRC contains its captions/, and the images as images/ID.jpg or .png.

    The captions state how an image differs from another one, not what it shows.
    """
    from unidiff_sdk.datasets.convert import convert, fashion_iq

    _report(convert(fashion_iq(src), out, source="fashion-iq", **options), out)


@convert.command(
    cls=Command,
    short_help="Amazon Berkeley Objects: listings in several languages.",
    epilog="unidiff dataset convert abo downloads/abo products --language de",
)
@_convert_options
@click.option("--language", default="en", show_default=True, help="Start of the language tag of the names: en, de_DE.")
def abo(src: Path, out: Path, language: str, **options: Any) -> None:
    """Convert Amazon Berkeley Objects. SRC contains listings/metadata/, images/metadata/ and images/small/."""
    from unidiff_sdk.datasets.convert import abo, convert

    _report(convert(abo(src, language), out, source=f"abo, {language}", **options), out)


@convert.command(
    cls=Command,
    short_help="H&M: articles with descriptions.",
    epilog="unidiff dataset convert hm downloads/hm fashion",
)
@_convert_options
def hm(src: Path, out: Path, **options: Any) -> None:
    """Convert the data of H&M Personalized Fashion Recommendations. SRC contains articles.csv and images/.

    All articles of a product are in the same split.
    """
    from unidiff_sdk.datasets.convert import convert, hm

    _report(convert(hm(src), out, source="hm", **options), out)


@convert.command(
    cls=Command,
    short_help="A fashion dataset that Marqo publishes on the hub.",
    epilog="unidiff dataset convert marqo downloads/Marqo-fashion200k fashion",
)
@_convert_options
def marqo(src: Path, out: Path, **options: Any) -> None:
    """Convert a dataset of Marqo, such as Marqo/fashion200k. SRC contains its data/*.parquet.

    All images of a product are in the same split.
    """
    from unidiff_sdk.datasets.convert import convert, marqo

    _report(convert(marqo(src), out, source=f"marqo, {src.resolve().name}", **options), out)


def _report(converted: Converted, out: Path) -> None:
    from unidiff_sdk.datasets.reader import describe_problems

    for line in describe_problems(converted.invalid, LISTED_PROBLEMS):
        echo(f"Skipped: {line}", err=True)
    counts = ", ".join(f"{count:,} {split}" for split, count in converted.counts.items())
    echo(f"{counts} pairs written to {out}. Next: unidiff-train {out / 'train'} --base tiny -o CKPT")
