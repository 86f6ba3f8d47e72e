"""`unidiff web`: a catalog as a static site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from unidiff_sdk.cli.console import Command, echo, echo_json
from unidiff_sdk.cli.locations.location import CatalogLocation, catalog_options
from unidiff_sdk.cli.parameters import json_option, references_option, trusted_key_option

__all__ = ["web"]


@click.command(
    cls=Command,
    short_help="Write a catalog as a static site that works in the browser.",
    epilog="""
    unidiff web shop.catalog -o site
    unidiff web shop.catalog -o site --bundle bundles/web --int8-vectors --rerank
    """,
)
@click.argument("catalog")
@click.option(
    "-o", "--out", required=True, metavar="SITE", type=click.Path(path_type=Path), help="Folder for the site."
)
@click.option(
    "--bundle",
    help="Model that the page runs: an export of the same checkpoint, such as one with --target web for WebGPU. "
    "Default: the bundle of the catalog.",
)
@click.option("--name", metavar="TITLE", help="Title of the page. Default: the name of the catalog.")
@click.option("--int8-vectors", is_flag=True, help="Store vectors with 8 bits for each number: a quarter of the bytes.")
@click.option("--rerank", is_flag=True, help="Include what re-ranking by the generator needs of each image.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier site.")
@references_option
@trusted_key_option
@json_option
@catalog_options
def web(
    catalog: CatalogLocation,
    out: Path,
    bundle: str | None,
    name: str | None,
    int8_vectors: bool,
    rerank: bool,
    overwrite: bool,
    references: Path | None,
    trusted_keys: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Write CATALOG, a folder or the URL of a Qdrant server, as a static site into the folder SITE.

    The page searches and generates in the browser of its visitor. Any web server can serve the folder, and after the
    first visit it works offline.
    """
    from unidiff_sdk.inference.bundle import Bundle

    from .site.writer import SiteOptions, write_site

    title = name or Path(catalog.place.rstrip("/")).name.removesuffix(".catalog") or "Catalog"
    options = SiteOptions(title, int8=int8_vectors, rerank=rerank, overwrite=overwrite)
    with catalog.open(references=references, trusted_keys=trusted_keys) as opened:
        model = None if bundle is None else Bundle.open(bundle, trusted_keys=trusted_keys)
        site = write_site(opened.parts(), out, options, model, progress=not as_json)
    if as_json:
        echo_json({name: str(value) if name == "path" else value for name, value in vars(site).items()})
        return
    first = f"{site.first_search_bytes / 1e6:.1f} MB before the first search"
    echo(f"{site.items:,} items, {site.bytes / 1e6:.1f} MB ({first}): {site.path}")
    echo(f"Next: python -m http.server --directory {site.path}")
