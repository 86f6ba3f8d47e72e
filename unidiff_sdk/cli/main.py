"""`unidiff`: the command group. Slow imports wait until a command needs them."""

from __future__ import annotations

import click

from .commands import check, delete, export, index, info, reindex, restore
from .console import Group
from .data.bulk import bulk
from .data.datasets import dataset
from .generate import generate
from .search import duplicates, search
from .servers.mcp import mcp
from .servers.serve import serve
from .servers.web import web

__all__ = ["main"]


@click.group(
    cls=Group,
    epilog="""
    unidiff dataset fashion-woman products --n 300
    unidiff index products shop.catalog
    unidiff search shop.catalog "red striped dress" --limit 5
    unidiff generate shop.catalog "purple dotted boots" -n 4 -o images
    unidiff serve shop.catalog
    """,
)
def main() -> None:
    """Search a product catalog by text and image, and generate new product images that fit it."""


for command in (
    dataset,
    index,
    bulk,
    search,
    duplicates,
    generate,
    serve,
    mcp,
    web,
    info,
    check,
    delete,
    reindex,
    export,
    restore,
):
    main.add_command(command)
