"""`unidiff search` and `unidiff duplicates`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from unidiff_sdk._internal.files import folder_kind
from unidiff_sdk.errors import OptionError, StoreError

from .console import Command, echo, echo_json
from .locations.location import CatalogLocation, catalog_options
from .output.terminal import counted, print_hits
from .parameters import (
    json_option,
    parse_where,
    refuse_options,
    stored_id,
    trusted_key_option,
    where_option,
)

__all__ = ["duplicates", "search"]

thumbnails_option = click.option(
    "--thumbnails/--no-thumbnails",
    default=None,
    help="Show thumbnails. Default: if the terminal supports images.",
)


@click.command(
    cls=Command,
    short_help="Search by text, image, or both.",
    epilog="""
    unidiff search shop.catalog "red striped dress"
    unidiff search shop.catalog "but in blue" --image dress.jpg --weights 0.6 0.4
    unidiff search shop.catalog --like D-17 --unlike D-4 --without stripes
    unidiff search shop.catalog "a long slim coat with navy checks" --imagine 4
    unidiff search shop.catalog "a long slim coat with navy checks" --rerank 8
    unidiff search shop.catalog "model QX-7719" --hybrid --group-by brand
    unidiff search shop.catalog boots --where '{"price": {"gte": 20, "lt": 80}}'
    """,
)
@click.argument("catalog")
@click.argument("text", required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Image to search with.")
@click.option("--like", multiple=True, metavar="ID", help="Find items similar to this item. Repeatable.")
@click.option("--unlike", multiple=True, metavar="ID", help="Avoid items similar to this item. Repeatable.")
@click.option("--without", multiple=True, metavar="TEXT", help="Avoid items that match this text. Repeatable.")
@click.option(
    "--imagine",
    default=0,
    metavar="N",
    help="Generate N images from the query and search with them as well. 1 to 16; 0 (default): off.",
)
@click.option(
    "--weights",
    type=float,
    nargs=2,
    metavar="FLOAT FLOAT",
    help="Weights of TEXT and --image. Only their ratio matters. Default: equal.",
)
@where_option
@click.option("--limit", default=10, show_default=True, help="Maximum number of hits, 1 to 10000.")
@click.option("--offset", default=0, show_default=True, help="Number of best hits to skip.")
@click.option("--cursor", help="Continue after a page: the cursor that it printed. Repeat its other options.")
@click.option("--min-score", type=float, help="Exclude hits with a lower score (cosine similarity), -1 to 1.")
@click.option("--diversity", type=float, help="0 (rank by similarity alone) to 1 (prefer variety). Default: 0.")
@click.option("--group-by", metavar="COLUMN", help="Return only the best hit for each value of this column.")
@click.option("--hybrid", is_flag=True, help="Also rank by the words of the captions (BM25).")
@click.option(
    "--rerank",
    default=0,
    metavar="K",
    help="Re-rank the best K hits with the generator. 2 to 64; 0 (default): off.",
)
@click.option("--ef", type=int, metavar="N", help="Candidates that the search index considers, 1 to 10000.")
@click.option("--exact", is_flag=True, help="Compare with every item instead of searching the index.")
@thumbnails_option
@trusted_key_option
@json_option
@catalog_options
def search(
    catalog: CatalogLocation,
    text: str | None,
    like: Sequence[str],
    unlike: Sequence[str],
    offset: int,
    thumbnails: bool | None,
    as_json: bool,
    where: str | None,
    trusted_keys: Sequence[str] | None,
    **options: Any,
) -> None:
    """Find the items in CATALOG that are most similar to TEXT, to an image, to other items, or to a mix of these."""
    if as_json:
        refuse_options("with --json", "thumbnails")
    if text is not None and not catalog.exists() and folder_kind(Path(text))[0] == "a catalog":
        raise OptionError(f"{text} is a catalog, and {catalog} is not. Swap them: unidiff search CATALOG TEXT")
    if text is None and not (options["image"] or like or unlike or options["without"]):
        raise OptionError("The query is empty. Give TEXT, --image, --like, --unlike or --without.")
    with catalog.reading(trusted_keys=trusted_keys) as opened:
        if not opened.count():
            raise StoreError(f"{catalog} is empty. Add items with: unidiff index FOLDER {catalog}")
        condition = parse_where(where)
        page = opened.search(
            text,
            like=[stored_id(opened, id) for id in like],
            unlike=[stored_id(opened, id) for id in unlike],
            where=condition,
            offset=offset,
            **options,
        )
    if as_json:
        facts = {"offset": page.offset, "limit": page.limit, "took_ms": page.took_ms, "cursor": page.cursor}
        echo_json({"hits": [hit.to_dict() for hit in page]} | facts)
        return
    print_hits(page, page.offset, thumbnails, _columns_of(condition, options["group_by"]))
    echo(f"{counted(len(page), 'hit')} in {page.took_ms:.1f} ms")
    if page.cursor:
        echo(f"Next page: --cursor={page.cursor}")


def _columns_of(where: Any, group_by: str | None) -> list[str]:
    """The columns that a search filters or groups by."""
    from unidiff_sdk.store.filters import parse, referenced_columns

    clause = parse(where)
    columns = referenced_columns(clause) if clause is not None else []
    return [column for column in dict.fromkeys([*columns, *([group_by] if group_by else [])]) if column != "text"]


@click.command(
    cls=Command,
    short_help="List groups of near-duplicates.",
    epilog="""
    unidiff duplicates shop.catalog
    unidiff duplicates shop.catalog --threshold 0.999 --json
    """,
)
@click.argument("catalog")
@click.option(
    "--threshold", default=0.95, show_default=True, help="Minimum cosine similarity of two duplicates, up to 1."
)
@where_option
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Maximum number of groups to print."
)
@thumbnails_option
@json_option
@catalog_options
def duplicates(
    catalog: CatalogLocation, threshold: float, where: str | None, limit: int, thumbnails: bool | None, as_json: bool
) -> None:
    """List the groups of items in CATALOG with (almost) the same image, the largest first.

    The score of an item is its cosine similarity to the most similar other item. A good threshold depends on the
    bundle: start high.
    """
    if as_json:
        refuse_options("with --json, which prints all groups", "thumbnails", "limit")
    with catalog.open() as opened:
        groups = opened.duplicates(threshold, where=parse_where(where))
    if as_json:
        echo_json([[hit.to_dict() for hit in group] for group in groups])
        return
    for group in groups[:limit]:
        print_hits(group, thumbnails=thumbnails)
    if not groups:
        echo(f"No duplicates: no two images have a cosine similarity of {threshold:g} or more.")
        return
    found = f"{counted(len(groups), 'group')} with {counted(sum(map(len, groups)), 'item')}"
    listed = f" The first {limit} are listed." if len(groups) > limit else ""
    echo(f"Found {found} and a cosine similarity of {threshold:g} or more.{listed}")
