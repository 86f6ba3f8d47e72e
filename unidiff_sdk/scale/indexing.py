"""Bulk indexing: read the parts of a dataset, encode them in a pool of processes, store them with their own ids."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unidiff_sdk._internal.json_values import number_within, whole_number
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk._internal.text import hide_key
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.catalog.catalog_file import MEMORY, CatalogFile
from unidiff_sdk.catalog.results import AddReport
from unidiff_sdk.catalog.writer import BulkAccess
from unidiff_sdk.datasets.layouts import find_layout
from unidiff_sdk.datasets.reader import InvalidRow, check_invalid_count, count_rows
from unidiff_sdk.errors import DataError, InUseError, OptionError, UniDiffError
from unidiff_sdk.store.images.object_storage import ObjectStorage, is_object_storage, user_cache
from unidiff_sdk.store.images.remote_images import RemoteImageStore

from .cluster import processes_per_machine, ray_data, require_ray
from .embeddings import Embeddings
from .parts import CHUNK_ROWS, Part, find_parts, pack, unpack
from .run_file import RunFile
from .stages import Encode, ImageFolder, Store, read

if TYPE_CHECKING:
    from unidiff_sdk.inference.bundle import Bundle

__all__ = ["absolute", "index", "is_url", "plain"]


def index(
    source: str | Path,
    to: str | Path,
    bundle: Bundle | str | Path | None = None,
    *,
    columns: Mapping[str, str | None] | None = None,
    kinds: Mapping[str, str] | None = None,
    workers: int = 1,
    gpus: float = 0,
    batch_size: int | None = None,
    embeddings: str | Path | ObjectStorage | None = None,
    record: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    **opening: Any,
) -> AddReport:
    """Index a dataset with several processes on Ray, as `Catalog.add_folder` does with one.

    Items get the ids of their rows, or a hash of image and caption. So a row that is read twice, because a process was
    killed or a run is repeated, is stored once. Of several rows with one id, an arbitrary one is stored.

    Args:
        source: a dataset as for `Catalog.add_folder`, on a file system that all machines have; or the URL of one in
            object storage. Images there are fetched by the processes that encode them.
        to: the catalog: the URL of a Qdrant server; or a folder, which one process writes.
        bundle: for a new catalog, as for `Catalog`. All machines must have it under this path.
        columns, kinds: as for `Catalog.add_folder`.
        workers: processes that encode, each with one open bundle and, without GPUs, one core.
        gpus: GPUs for each of them, such as 1 or 0.5. 0: the CPU.
        batch_size: images that a worker encodes at once, 1 to 64. Default: on the CPU, what fits into half of the free
            memory, by a measurement at the start; with GPUs, 64.
        embeddings: a folder or URL for Parquet files with the embeddings, for one bundle and any number of datasets. A
            chunk is written there before it is stored. Images that have their embedding there, in the file of the same
            chunk, are not encoded again.
        record: the file that records finished chunks and invalid rows. Default: a file in the cache of this user.
        resume: skip the chunks that the record of an interrupted run has.
        progress: show a progress bar.
        opening: further arguments of `Catalog`: images, collection, api_key, server.

    Returns:
        A report over all runs that were resumed. The lines of invalid rows are those in their own file.

    Raises:
        ProviderError: Ray is not installed.
        OptionError: an argument is invalid.
        DataError: the source is missing or holds nothing that can be read; or with `resume`, there is no record, or
            that of another job.
        StoreError, BundleError: as for `Catalog`; the embeddings are of another bundle; the source cannot be read or
            has changed; or a machine has another bundle or does not see the catalog. What was stored until then is
            recorded.
    """
    started = time.perf_counter()
    workers = whole_number("workers", workers, at_least=1)
    gpus = number_within("gpus", gpus, 0, 64, OptionError)
    if batch_size is not None and whole_number("batch_size", batch_size, at_least=1) > CHUNK_ROWS:
        raise OptionError(f"batch_size is {batch_size}. Give an integer from 1 to {CHUNK_ROWS}.")
    if str(to) == MEMORY:
        raise OptionError(f"A catalog at {MEMORY!r} is of one process. Give a folder, or the URL of a Qdrant server.")
    parts = find_parts(source)
    require_ray()
    opening = hide_key(opening)
    with Catalog(to, bundle, **opening) as catalog:  # reports what is wrong with it, before processes start
        opened, folder, source = catalog.bundle, catalog.folder, absolute(source)
        access = BulkAccess(catalog)
        origin = access.source_uri(source)
        found = CatalogFile.read(folder)
        created = found.created if found is not None else None
        is_remote = isinstance(catalog.parts().images, RemoteImageStore)
        files = None if embeddings is None else Embeddings.open(embeddings, access.bundle, source)
    to, opening = absolute(to), absolute_images(opening)
    job = {
        "source": source,
        "to": [to, absolute(folder), opening.get("collection"), created],
        "bundle": opened.fingerprint,
        "options": [columns, kinds, CHUNK_ROWS, "by line"],
        "embeddings": files and files.name,
        "parts": [[part.name, part.size, part.modified] for part in parts],
    }
    file = RunFile(Path(record) if record is not None else _record_place(job), job, resume=resume)
    # Another machine that cannot see this catalog must not create one of its own.
    arguments = {"location": to, "bundle": absolute(opened.path), "create": False, **plain(opening)}
    try:
        if left := _open_parts(parts, origin, file):
            with ray_data(workers + 1, workers * gpus) as data:
                encoding = {
                    "bundle": arguments["bundle"],
                    "fingerprint": opened.fingerprint,
                    "device": "cuda" if gpus else "cpu",
                    "batch_size": batch_size or (CHUNK_ROWS if gpus else None),
                    "processes": processes_per_machine(workers),
                    "embeddings": files,
                    "images": None if is_remote or created is None else ImageFolder(Path(absolute(folder)), created),
                }
                finished = _stages(data, left, arguments, encoding, columns, kinds, workers, gpus)
                _record_all(finished, file, _total(source) if progress else 0, progress)
        if not is_url(to):
            _optimize(to, opening)
        return _report(file, parts, started, source)
    finally:
        file.close()


def _stages(
    data: Any,
    parts: list[dict[str, Any]],
    opening: dict[str, Any],
    encoding: dict[str, Any],
    columns: Any,
    kinds: Any,
    workers: int,
    gpus: float,
) -> Iterable[Mapping[str, Any]]:
    """The finished chunks. Ray starts a killed process again, and repeats what it had not finished."""
    pool = data.ActorPoolStrategy
    # A folder is written by one process. Writers to a server mostly wait.
    writers = workers if is_url(opening["location"]) else 1
    rows = data.from_items(parts, override_num_blocks=len(parts))
    rows = rows.flat_map(read, fn_kwargs={"columns": columns, "kinds": kinds}, num_cpus=0.5)
    rows = rows.repartition(target_num_rows_per_block=1)
    rows = rows.map_batches(
        Encode,
        fn_constructor_kwargs=encoding,
        batch_size=1,
        compute=pool(size=workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    rows = rows.map_batches(
        Store, fn_constructor_kwargs={"opening": opening}, batch_size=1, compute=pool(size=writers), num_cpus=0.01
    )
    finished: Iterable[Mapping[str, Any]] = rows.iter_rows()
    return finished


def _open_parts(parts: list[Part], origin: str, file: RunFile) -> list[dict[str, Any]]:
    complete = file.complete
    return [
        {"number": number, "part": pack((part, origin, file.done.get(number, set())))}
        for number, part in enumerate(parts)
        if number not in complete
    ]


def _record_all(finished: Iterable[Mapping[str, Any]], file: RunFile, total: int, progress: bool) -> None:
    with progress_bar("Indexing", progress) as advance:
        done = sum(_rows_of(entry) for entry in file.entries())
        for row in finished:
            result = unpack(row["rows"])
            if isinstance(result, UniDiffError):
                raise result
            entry = {"part": int(row["number"]), "chunk": int(row["chunk"]), "last": bool(row["last"]), **result}
            file.add(entry)
            done += _rows_of(entry)
            advance(done, total)


def _optimize(to: str, opening: Mapping[str, Any]) -> None:
    """Build the search index of a catalog in a folder if it is large, as `Catalog.add_folder` does."""
    try:
        with Catalog(to, create=False, **opening) as catalog:
            BulkAccess(catalog).optimize_if_large()
    except InUseError as error:  # a cluster may not have ended the process that wrote it
        warn(f"All items are stored, but the search index was not built. Call optimize() later. {error}")


def _rows_of(entry: Mapping[str, Any]) -> int:
    return int(entry["added"]) + int(entry["skipped"]) + len(entry["failed"])


def _report(file: RunFile, parts: list[Part], started: float, source: str) -> AddReport:
    added = skipped = 0
    failed: list[InvalidRow] = []
    for entry in file.entries():
        added, skipped = added + entry["added"], skipped + entry["skipped"]
        for line, name, reason, hides in entry["failed"]:
            where = f" ({parts[entry['part']].name})" if len(parts) > 1 else ""
            failed.append(InvalidRow(line, name, reason + where, hides))
        check_invalid_count(source, len(failed))
    failed.sort(key=lambda row: (row.line, row.file_name))
    return AddReport(added, skipped, tuple(failed), time.perf_counter() - started)


def _total(source: str) -> int:
    """The number of rows for the progress bar; 0 if it is not known, or takes long to count."""
    if is_object_storage(source) or find_layout(source, captions=False).shards:
        return 0
    try:
        return count_rows(source, captions=False)
    except DataError:  # of a part, which becomes an invalid row
        return 0


def _record_place(job: Mapping[str, Any]) -> Path:
    return user_cache("bulk", f"{job['source']}\0{job['to']}").with_suffix(".jsonl")


def is_url(place: str) -> bool:
    """Whether a place is a URL, not a folder or file."""
    return "://" in place


def absolute(place: str | os.PathLike[str]) -> str:
    """A place under a name that all processes understand: each can have another working folder. URLs are kept."""
    text = os.fspath(place)
    return text if is_url(text) or text == MEMORY else os.path.abspath(text)


def absolute_images(opening: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Catalog`, with the folder of the images as `absolute` gives it."""
    images = opening.get("images")
    return {**opening, **({"images": absolute(images)} if isinstance(images, str | os.PathLike) else {})}


def plain(opening: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Catalog` that Ray can pass on."""
    key = opening.get("api_key")
    return {**opening, **({} if key is None else {"api_key": key.reveal()})}
