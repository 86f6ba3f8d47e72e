"""`unidiff bulk`: jobs with several processes on Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.cli.console import Command, Group
from unidiff_sdk.cli.locations.location import CatalogLocation, qdrant_options
from unidiff_sdk.cli.parameters import json_option, parse_pairs

__all__ = ["bulk"]


@click.group(
    cls=Group,
    short_help="Index with several processes or machines (Ray).",
    epilog="""
    unidiff bulk index shards --to http://qdrant:6333 --image-store s3://b/shop
    """,
)
def bulk() -> None:
    """Run jobs with several processes on Ray: on this machine, or on the cluster of RAY_ADDRESS."""


@bulk.command(
    cls=Command,
    resuming="What is stored is recorded. Run the same command with --resume to continue.",
    short_help="Index a dataset with several processes.",
    epilog="""
    unidiff bulk index shards --to http://qdrant:6333 --image-store s3://b/shop
    unidiff bulk index s3://b/shards --to shop.catalog --gpus 1
    unidiff bulk index products --to shop.catalog --workers 4 --resume
    """,
)
@click.argument("source")
@click.option("--to", required=True, metavar="CATALOG", help="Catalog: a folder, or the URL of a Qdrant server.")
@click.option("--bundle", help="Bundle for a new catalog, under a path that all machines have.")
@click.option("--workers", default=1, show_default=True, metavar="N", help="Processes that encode, one core each.")
@click.option("--gpus", default=0.0, metavar="N", help="GPUs for each of them. 0 (default): the CPU.")
@click.option(
    "--columns", callback=parse_pairs, metavar="ROLE=NAME,…", help="Names of columns, as for `unidiff index`."
)
@click.option("--kinds", callback=parse_pairs, metavar="COLUMN=KIND,…", help="Kinds of columns.")
@click.option("--resume", is_flag=True, help="Skip what an interrupted run of this job has stored.")
@click.option(
    "--record",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File that records finished work. Default: in the cache of this user.",
)
@json_option
@qdrant_options
def index(locate: Callable[[str], CatalogLocation], source: str, to: str, as_json: bool, **options: Any) -> None:
    """Add the dataset SOURCE to a catalog, which is created if it does not exist.

    SOURCE is a folder or file as for `unidiff index`, or the URL of shards (.tar) and parquet files in object storage.
    Rows that are stored already are not changed. Invalid rows are skipped and listed at the end.
    """
    from unidiff_sdk.cli.output.add_report import print_add_report
    from unidiff_sdk.scale import index as bulk_index

    location = locate(to)
    report = bulk_index(source, location.place, progress=not as_json, **options, **location.opening())
    with location.open() as opened:
        items = opened.count()
    print_add_report(report, source, location, items, as_json)
