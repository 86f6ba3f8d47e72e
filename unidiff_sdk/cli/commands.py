"""The commands that manage a catalog: index, info, check, delete, reindex, export and restore."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.errors import OptionError

from .console import Command, echo, echo_json
from .locations.location import CatalogLocation, catalog_options
from .output.terminal import counted, print_table
from .parameters import (
    json_option,
    parse_pairs,
    parse_where,
    references_option,
    stored_id,
    trusted_key_option,
    where_option,
)

__all__ = ["check", "delete", "export", "index", "info", "reindex", "restore"]


@click.command(
    cls=Command,
    resuming="The items added so far are kept. Run the same command again to add the others.",
    short_help="Add a folder of images to a catalog.",
    epilog="""
    unidiff index products shop.catalog
    unidiff index photos shop.catalog --bundle bundles/shop --reference
    unidiff index products shop.catalog --prune
    unidiff index spring.csv shop.catalog --images photos
    """,
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("catalog")
@click.option(
    "--bundle", help="Bundle for a new catalog: a folder, hf:org/name, or tiny (default): the built-in model."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="With a table: folder that its file names are relative to. Default: the folder of the table.",
)
@click.option(
    "--columns",
    callback=parse_pairs,
    metavar="ROLE=NAME,…",
    help="Names of columns: image=photo,text=title,id=sku. text= reads no captions.",
)
@click.option(
    "--kinds", callback=parse_pairs, metavar="COLUMN=KIND,…", help="Kinds of columns: string, number or boolean."
)
@click.option("--reference", is_flag=True, help="Reference the image files where they are instead of copying them.")
@click.option("--prune", is_flag=True, help="Delete items that were indexed from FOLDER and are no longer in it.")
@click.option("--strict", is_flag=True, help="Fail on the first invalid row instead of skipping it.")
@trusted_key_option
@click.option("--rerank", is_flag=True, help="Also compute what search --rerank needs of each image.")
@json_option
@catalog_options
def index(
    folder: Path,
    catalog: CatalogLocation,
    bundle: str | None,
    images: Path | None,
    columns: dict[str, str | None] | None,
    kinds: dict[str, str] | None,
    reference: bool,
    prune: bool,
    strict: bool,
    trusted_keys: Sequence[str] | None,
    rerank: bool,
    as_json: bool,
) -> None:
    """Add the images in FOLDER to CATALOG, which is created if it does not exist.

    FOLDER contains images and a metadata.jsonl, metadata.csv or metadata.parquet. Each row names an image (file_name)
    and its caption (text). The other columns are stored for filters. FOLDER can also be
    a folder of webdataset shards (.tar), a single shard, or a table (.jsonl, .csv, .parquet) of any name.

    Rows that have not changed since the last run are skipped. Invalid rows are skipped and listed at the end.
    """
    from unidiff_sdk.datasets.reader import TABLES, read_catalog

    from .output.add_report import print_add_report

    if images is not None and folder.suffix.lower() not in TABLES:
        raise OptionError(f"--images needs a table ({', '.join(TABLES)}), and {folder} is not one. Omit --images.")
    names: dict[str, Any] = {"columns": columns, "kinds": kinds}
    # Fails before an empty catalog is created.
    next(read_catalog(folder, images=images, captions=False, on_error=lambda row: None, **names), None)
    with catalog.open(bundle, create=True, trusted_keys=trusted_keys) as opened:
        options: dict[str, Any] = {"prune": prune, "strict": strict, "progress": not as_json, "copy": not reference}
        options |= names
        if folder.suffix.lower() in TABLES:
            report = opened.add_table(folder, images=images, **options)
        else:
            report = opened.add_folder(folder, **options)
        if rerank:
            opened.prepare_rerank(progress=not as_json)
        items = opened.count()
    print_add_report(report, folder, catalog, items, as_json)


@click.command(
    cls=Command,
    short_help="Show what a catalog or a bundle contains.",
    epilog="""
    unidiff info shop.catalog --json
    unidiff info bundles/shop
    """,
)
@click.argument("catalog")
@json_option
@catalog_options
def info(catalog: CatalogLocation, as_json: bool) -> None:
    """Show the number of items in CATALOG, its columns, and the bundle that it was indexed with.

    CATALOG can also be the folder of a bundle: then show its precision, and what it can do.
    """
    if catalog.is_bundle:
        _show_bundle(Path(catalog.place), as_json)
        return
    with catalog.reading() as opened:
        facts = opened.info()
    if as_json:
        echo_json(facts)
        return
    bundle = facts["bundle"]
    echo(f"Catalog: {facts['location']}, {counted(facts['items'], 'item')}, created {facts['created']}")
    echo(f"Bundle:  {bundle['name']}, {bundle['dim']} dimensions, fingerprint {bundle['fingerprint'][:12]}")
    echo(f"         {bundle['path']}")
    if bundle["purpose"] == "search only":
        echo("         search only: it has no generator")
    if facts["columns"]:
        print_table(["column", "type"], facts["columns"].items())


def _show_bundle(folder: Path, as_json: bool) -> None:
    """Print the facts of a bundle. No graph is loaded."""
    from unidiff_sdk.inference.bundle import Bundle

    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    facts = {
        "bundle": bundle.name,
        "path": str(bundle.path),
        "purpose": manifest.purpose,
        "precision": manifest.precision,
        "target": manifest.target,
        "graphs": list(manifest.graphs),
        "loras": {name: lora.weight for name, lora in manifest.loras.items()},
        "dim": manifest.embedding.dim if manifest.embedding else None,
        "fingerprint": bundle.fingerprint,
    }
    if as_json:
        echo_json(facts)
        return
    echo(f"Bundle:  {bundle.name}, {manifest.purpose}, {manifest.precision}, fingerprint {bundle.fingerprint[:12]}")
    echo(f"         {bundle.path}")
    echo(f"Graphs:  {', '.join(manifest.graphs)}")
    if manifest.loras:
        echo(f"LoRAs:   {', '.join(manifest.loras)}")


@click.command(
    cls=Command,
    short_help="Check a catalog, and repair it.",
    epilog="""
    unidiff check shop.catalog
    unidiff check shop.catalog --repair
    """,
)
@click.argument("catalog")
@click.option("--repair", is_flag=True, help="Delete unused images and leftovers, and complete the search index.")
@json_option
@catalog_options
def check(catalog: CatalogLocation, repair: bool, as_json: bool) -> None:
    """Compare the items of CATALOG with its image files. The exit code is 1 if a problem remains."""
    with catalog.open() as opened:
        report = opened.check(repair=repair)
    if as_json:
        echo_json(asdict(report))
    else:
        orphans, leftovers = len(report.orphaned_images), len(report.leftovers)
        found = f"{counted(orphans, 'unused image file')} and {counted(leftovers, 'leftover')} found"
        echo(f"{counted(report.items, 'item')} checked, {found}.", *report.remaining)
    if report.remaining:
        sys.exit(1)


@click.command(cls=Command, short_help="Delete items.", epilog="unidiff delete shop.catalog boots-17 boots-18")
@click.argument("catalog")
@click.argument("ids", nargs=-1, required=True)
@json_option
@catalog_options
def delete(catalog: CatalogLocation, ids: Sequence[str], as_json: bool) -> None:
    """Delete the items with these IDS from CATALOG, and their images. Unknown ids are ignored."""
    with catalog.open() as opened:
        removed = opened.delete([stored_id(opened, id, unambiguous=True) for id in ids])
        items = opened.count()
    if as_json:
        echo_json({"removed": removed, "items": items})
    else:
        echo(f"{counted(removed, 'item')} deleted. {catalog} has {counted(items, 'item')}.")


@click.command(
    cls=Command,
    resuming="The catalog still has its old vectors. Run the same command again to continue.",
    short_help="Encode a catalog with another bundle.",
    epilog="unidiff reindex shop.catalog bundles/tuned",
)
@click.argument("catalog")
@click.argument("bundle")
@references_option
@trusted_key_option
@json_option
@catalog_options
def reindex(
    catalog: CatalogLocation, bundle: str, references: Path | None, trusted_keys: Sequence[str] | None, as_json: bool
) -> None:
    """Encode all images of CATALOG with BUNDLE, which becomes the bundle of the catalog."""
    with catalog.open(references=references, trusted_keys=trusted_keys) as opened:
        count = opened.reindex(bundle, progress=not as_json)
    if as_json:
        echo_json({"reindexed": count})
    elif count:
        echo(f"{counted(count, 'item')} encoded with {bundle}.")
    else:
        echo(f"{catalog} already uses {bundle}.")


@click.command(
    cls=Command,
    resuming="Nothing was written.",
    short_help="Write a catalog to one parquet file.",
    epilog="""
    unidiff export shop.catalog shop.parquet
    unidiff export shop.catalog generated.parquet --where '{"generated": true}'
    """,
)
@click.argument("catalog")
@click.argument("file", type=click.Path(path_type=Path))
@where_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier export at FILE.")
@references_option
@json_option
@catalog_options
def export(
    catalog: CatalogLocation, file: Path, where: str | None, overwrite: bool, references: Path | None, as_json: bool
) -> None:
    """Write all items of CATALOG, with their vectors and images, to the parquet FILE. `unidiff restore` reads it."""
    with catalog.reading(references=references) as opened:
        count = opened.export(file, where=parse_where(where), overwrite=overwrite, progress=not as_json)
    size = file.stat().st_size
    if as_json:
        echo_json({"items": count, "bytes": size})
    else:
        echo(f"{counted(count, 'item')} written to {file} ({size / 1e6:,.1f} MB).")


@click.command(
    cls=Command,
    resuming="No catalog was created.",
    short_help="Create a catalog from an exported file.",
    epilog="""
    unidiff restore shop.parquet shop.catalog
    unidiff restore shop.parquet tuned.catalog --bundle bundles/tuned --reencode
    """,
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("catalog")
@click.option("--bundle", help="Bundle folder, if it has moved since the export. Another bundle needs --reencode.")
@click.option("--reencode", is_flag=True, help="Encode the images again instead of using the vectors in FILE.")
@trusted_key_option
@json_option
@catalog_options
def restore(
    file: Path,
    catalog: CatalogLocation,
    bundle: str | None,
    reencode: bool,
    trusted_keys: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Create CATALOG from FILE, which was written by `unidiff export`.

    FILE can be a folder that `unidiff bulk index --embeddings` wrote, if the image store has the images.
    """
    from unidiff_sdk.catalog.catalog import Catalog

    options: dict[str, Any] = {"reencode": reencode, "progress": not as_json, "trusted_keys": trusted_keys}
    with Catalog.restore(file, catalog.place, bundle, **options, **catalog.opening()) as opened:
        items = opened.count()
    if as_json:
        echo_json({"items": items})
    else:
        echo(f"{catalog} has {counted(items, 'item')}.")
