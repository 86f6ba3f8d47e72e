"""`unidiff mcp`: a catalog for language models, over standard input and output."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import click

from unidiff_sdk.cli.console import Command
from unidiff_sdk.cli.locations.location import CatalogLocation, catalog_options
from unidiff_sdk.cli.parameters import trusted_key_option
from unidiff_sdk.errors import ProviderError

__all__ = ["mcp"]


@click.command(
    cls=Command,
    short_help="Serve a catalog to language models (MCP).",
    epilog="""
    unidiff mcp shop.catalog
    unidiff mcp shop.catalog --allow-writes
    """,
)
@click.argument("catalog")
@click.option("--allow-writes", is_flag=True, help="Add a tool that adds items.")
@click.option(
    "--max-images", default=16, show_default=True, type=click.IntRange(min=1), help="Images that one call may generate."
)
@click.option(
    "--max-size",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="PX",
    help="Width and height of generated images.",
)
@trusted_key_option
@catalog_options
def mcp(
    catalog: CatalogLocation, allow_writes: bool, max_images: int, max_size: int, trusted_keys: Sequence[str] | None
) -> None:
    """Serve CATALOG by the Model Context Protocol over standard input and output, until the client closes them."""
    try:
        from .mcp_tools import create_mcp
    except ImportError as error:
        raise ProviderError(f"The MCP server is not installed ({error}): pip install 'unidiff-sdk[mcp]'") from error
    logging.basicConfig(level=logging.WARNING)  # to standard error: standard output belongs to the protocol
    with catalog.open(trusted_keys=trusted_keys) as opened:
        create_mcp(opened, allow_writes=allow_writes, max_images=max_images, max_size=max_size).run()
