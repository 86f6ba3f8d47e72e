"""`unidiff bulk`: jobs with several processes on Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.cli.console import Command, Group, echo, echo_json
from unidiff_sdk.cli.locations.location import CatalogLocation, qdrant_options
from unidiff_sdk.cli.output.terminal import print_table
from unidiff_sdk.cli.parameters import json_option, parse_pairs

__all__ = ["bulk"]

gpus_option = click.option("--gpus", default=0.0, metavar="N", help="GPUs for each of them. 0 (default): the CPU.")
record_option = click.option(
    "--record",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File that records finished work. Default: in the cache of this user.",
)


@click.group(
    cls=Group,
    short_help="Index or generate with several processes (Ray).",
    epilog="""
    unidiff bulk index shards --to http://qdrant:6333 --image-store s3://b/shop
    unidiff bulk generate prompts.txt --to generated -n 4 --workers 8
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
@gpus_option
@click.option("--batch-size", type=int, metavar="N", help="Images encoded at once, 1 to 64. Default: by free memory.")
@click.option(
    "--columns", callback=parse_pairs, metavar="ROLE=NAME,…", help="Names of columns, as for `unidiff index`."
)
@click.option("--kinds", callback=parse_pairs, metavar="COLUMN=KIND,…", help="Kinds of columns.")
@click.option(
    "--embeddings",
    metavar="FOLDER|URL",
    help="Place of Parquet files with the embeddings, from which a later run takes those of the same chunk.",
)
@click.option("--resume", is_flag=True, help="Skip what an interrupted run of this job has stored.")
@record_option
@json_option
@qdrant_options
def index(locate: Callable[[str], CatalogLocation], source: str, to: str, as_json: bool, **options: Any) -> None:
    """Add the dataset SOURCE to a catalog, which is created if it does not exist.

    SOURCE is a folder or file as for `unidiff index`, or the URL of a dataset in object storage.
    Rows that are stored already are not changed. Invalid rows are skipped and listed at the end.
    """
    from unidiff_sdk.cli.output.add_report import print_add_report
    from unidiff_sdk.scale import index as bulk_index

    location = locate(to)
    report = bulk_index(source, location.place, progress=not as_json, **options, **location.opening())
    with location.open() as opened:
        items = opened.count()
    print_add_report(report, source, location, items, as_json)


@bulk.command(
    cls=Command,
    resuming="What is generated is recorded. Run the same command with --resume to continue.",
    short_help="Generate images from a file of prompts.",
    epilog="""
    unidiff bulk generate prompts.txt --to generated -n 4 --workers 8
    unidiff bulk generate prompts.csv --to s3://b/generated --best-of 4 --gpus 1
    unidiff bulk generate prompts.txt --to new --catalog shop --max-similarity .97
    """,
)
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="FOLDER|URL", help="Place of the dataset: a folder, or s3://…")
@click.option("--bundle", help="Bundle. Default: that of --catalog, or tiny.")
@click.option("--catalog", help="Catalog that --max-similarity compares with.")
@click.option("-n", default=1, show_default=True, help="Number of images of each prompt.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first image. Each row has its own seeds.")
@click.option("--steps", type=int, help="Denoising steps. Default: from the bundle.")
@click.option("--best-of", type=int, metavar="M", help="Generate M candidates of each prompt and keep the best n.")
@click.option("--min-score", type=float, help="Replace candidates whose cosine similarity to the prompt is lower.")
@click.option("--max-similarity", type=float, help="Replace candidates whose cosine similarity to an item is higher.")
@click.option("--duplicates", type=float, metavar="C", help="Leave out images this similar to one of an earlier row.")
@click.option("--workers", default=1, show_default=True, metavar="N", help="Processes, one core each.")
@gpus_option
@click.option("--resume", is_flag=True, help="Skip what an interrupted run of this job has generated.")
@record_option
@json_option
@qdrant_options
def generate(
    locate: Callable[[str], CatalogLocation],
    prompts: Path,
    to: str,
    catalog: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate images from each prompt in PROMPTS: a text file with one on each line, or a table (text).

    The result is a dataset with the recipe, score and nearest item of each image. The same seeds give the same images
    with any number of processes.
    """
    from unidiff_sdk.scale import generate as bulk_generate

    location = locate(catalog or ":memory:")
    given = {name: value for name, value in options.items() if value is not None}
    place = None if catalog is None else location.place
    report = bulk_generate(prompts, to, catalog=place, progress=not as_json, opening=location.opening(), **given)
    failed = [{"line": row.line, "prompt": row.file_name, "reason": row.reason} for row in report.failed]
    if as_json:
        counts = {"images": report.images, "generated": report.generated, "duplicates": report.duplicates}
        echo_json(counts | {"seconds": report.seconds, "failed": failed})
        return
    if failed:
        print_table(["line", "prompt", "problem"], ([row["line"], row["prompt"], row["reason"]] for row in failed[:20]))
    echo(f"{report}. They are in {to}.")
