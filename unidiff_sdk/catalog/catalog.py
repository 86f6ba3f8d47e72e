"""The façade: a catalog of pictures that is searched and added to by one model, a bundle."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy.typing as npt
from PIL import Image

from unidiff_sdk._internal.compact_set import CompactSet
from unidiff_sdk._internal.images import ImageSource
from unidiff_sdk._internal.parallel import buffered_map
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk.datasets.reader import TABLES, InvalidRow, count_rows, read_catalog
from unidiff_sdk.errors import DataError, OptionError, StoreError
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.retrieval.columns import column_kinds, facet_counts, ordered, warn_about_unknown_columns
from unidiff_sdk.retrieval.duplicates import near_duplicates
from unidiff_sdk.retrieval.options import SearchOptions, check_page
from unidiff_sdk.retrieval.query import Query, checked_ids
from unidiff_sdk.retrieval.results import Hit, Page
from unidiff_sdk.retrieval.searcher import Searcher
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import parse
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.images import ImageStore
from unidiff_sdk.store.location import VECTORS, Location
from unidiff_sdk.store.payload import SYSTEM as _SYSTEM

from . import generating
from .aio import Opening, cancellable, twin
from .catalog_file import CHANGING, BundleRef, CatalogFile, new_place
from .items import item_of, items_of
from .results import AddReport, Generated, Generation
from .snapshot import Serving
from .writer import BATCH_SIZE, Prepared, Writer

if TYPE_CHECKING:
    from unidiff_sdk.generation.generator import Preview
    from unidiff_sdk.store.server.connection import ServerOptions

    from .archive import Archive, ArchivedItem

__all__ = ["Catalog"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

# A graph index of 20,000 vectors takes 10 s to build and searches no faster than the plain scan; of 100,000, ten times.
OPTIMIZE_FROM = 50_000
CATCH_UP_ROUNDS = 8  # of a reindexing, before it makes writers wait


class Catalog:
    """A collection of pictures with captions and columns, searched and extended by one bundle.

        with Catalog("shop.catalog", bundle="bundles/shop") as catalog:
            catalog.add_folder("products/")
            hits = catalog.search("red striped dress", where={"price": {"lt": 80}})
            pictures = catalog.generate("purple dotted boots", n=4, seed=7)

    Everything is in the one folder `location`, which may be moved; `bundle` is remembered. Safe to use from several
    threads; one process at a time may hold a folder. For asyncio the methods have twins that leave the loop alone:
    `async with Catalog.aopen("shop.catalog") as catalog: await catalog.asearch("boots")`.

    Args:
        location: a folder, made if it does not exist; ":memory:", which is gone at `close`; or the http(s) URL of a
            Qdrant server or cluster.
        bundle: a folder that `unidiff-export` wrote, or an open Bundle. Default: the one that the catalog was made
            with; for a new catalog "tiny", the built-in model.
        create: whether a missing folder is made; if not, it is an error.
        quantization: "scalar" lets a new catalog in a folder be searched through 8-bit vectors, in a quarter of the
            memory; scores stay exact, as the originals on disk rank the hits.
        images: only with a URL, and needed there: the folder that keeps the pictures.
        collection, api_key, server: only with a URL: the collection's name, the key, and `ServerOptions`: timeouts,
            retries, gRPC; shards, replicas and quantization of a new collection.

    Raises:
        StoreError: the location is no catalog, is in use, or was made with another bundle.
        BundleError: the bundle is missing or damaged.
    """

    def __init__(
        self,
        location: str | Path = ":memory:",
        bundle: Bundle | str | Path | None = None,
        *,
        create: bool = True,
        quantization: str | None = None,
        images: str | Path | None = None,
        collection: str = "catalog",
        api_key: str | None = None,
        server: ServerOptions | None = None,
    ) -> None:
        self._lazy_lock = threading.RLock()
        self._reindexing = threading.Lock()
        self._searching: Searcher | None = None

        # 1. Where: vectors in a folder or on a server, pixels and catalog.json in a folder.
        self.location = str(location)
        self._url = self.location if self.location.startswith(("http://", "https://")) else None
        self._temporary: weakref.finalize[..., Any] | None = None
        if self._url:
            if quantization is not None:
                raise OptionError("On a server quantization is the collection's: server=ServerOptions(quantization=…)")
            if images is None:
                raise OptionError(
                    "A Qdrant server keeps vectors; say where the pictures go: Catalog(url, images='folder')"
                )
            self.folder = Path(images)
        elif self.location == ":memory:":
            self.folder = Path(tempfile.mkdtemp(prefix="unidiff-"))
            self._temporary = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        else:
            self.folder = Path(location)

        # 2. With which bundle: the given one, the remembered one, or the built-in one.
        file = CatalogFile.read(self.folder)
        if file is None and not create:
            raise StoreError(f"There is no catalog at {self.folder}. `unidiff index FOLDER {self.folder}` makes one.")
        opened: Bundle | None = None
        if bundle is not None or file is None:
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if file is None:
            file = CatalogFile.new(cast(Bundle, opened), self.folder)
            file.write(self.folder)
        elif opened is not None:
            file = file.adopt(opened, self.folder)
        self._file = file

        # 3. The vectors and the pixels.
        self._images = ImageStore(self.folder)
        self._hit = partial(Hit.from_payload, images=self._images)  # no method: who keeps it does not keep the catalog
        self._where = Location(self.folder, quantization, self._url, collection, api_key, server)
        store = self._where.open(file.vectors, file.bundle.dim, file.bundle.fingerprint)
        self._writer = Writer(Serving(store, self.folder, file.bundle, opened), self._images, self.location)
        _log.debug("opened %s, indexed with the bundle %s", self.location, file.bundle.name)

    # -------------------------------------------------------------------------------------------- life

    @property
    def bundle(self) -> Bundle:
        """The model; opened when first needed. Raises BundleError if it is missing or damaged, StoreError if in its
        place lies another one."""
        return self._serving.bundle

    @property
    def _serving(self) -> Serving:
        return self._writer.serving

    @property
    def _store(self) -> Store:
        return self._serving.store

    def close(self) -> None:
        """Write out everything and let go of the folder. May be called twice; anything else afterwards is an error."""
        with self._writer.lock:
            if not self._writer.closed:
                self._writer.closed = True
                self._store.close()
                if self._temporary:
                    self._temporary()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Catalog({self.location!r}, bundle={self._file.bundle.name!r})"

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True  # an empty catalog is still a catalog

    # -------------------------------------------------------------------------------------------- adding

    def add(
        self,
        images: Any,
        texts: str | Sequence[str] | None = None,
        ids: str | int | Sequence[str | int] | None = None,
        payloads: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        copy: bool = True,
    ) -> list[str | int]:
        """Add pictures, or replace those that have the same id. All of them are stored, or none.

        Args:
            images: one picture or a sequence of them: paths, bytes of image files, PIL images, arrays; hits, which
                bring their id, caption and columns; or what `generate` returned, whose prompt becomes the caption and
                whose settings become columns.
            texts: their captions, as many.
            ids: strings or integers, as many. Default: a hash of picture and caption, so that adding twice is harmless.
            payloads: further columns, as many: JSON values under names other than id and text.
            copy: whether image files are copied into the catalog or only referenced where they are.

        Returns:
            The ids.

        Raises:
            OptionError: lengths do not match, or an id, caption or payload is not a valid one.
            ImageError: a picture cannot be read.
            StoreError: an embedding is not finite, or the disk is full.
        """
        items = list(items_of(images, texts, ids, payloads))
        self._writer.add(items, copy=copy)
        return [item.id for item in items]

    def add_folder(
        self,
        path: str | Path,
        *,
        prune: bool = False,
        strict: bool = False,
        progress: bool = False,
        copy: bool = True,
    ) -> AddReport:
        """Add a folder of images with `metadata.jsonl`, `.csv` or `.parquet` beside them, or of webdataset shards.

        Rows with an `id` column keep it; the others get a hash of picture and caption. A row with the id of an earlier
        one is a bad row. What is there already and has not changed is passed over, so an interrupted run is simply
        started again. Where only columns have changed, the picture is not encoded again. At the end, the search index
        is built if that pays.

        Args:
            path: the folder, or a single `.tar` shard (`datasets.reader` tells the formats).
            prune: also delete what an earlier call has added from this folder and is no longer in it. An item whose row
                has gone bad is gone too.
            strict: raise at the first bad row; what came before it stays stored.
            progress: show a progress bar.
            copy: whether the images are copied into the catalog or only referenced where they are.

        Raises:
            DataError: the folder or its metadata file is missing; in strict mode, a bad row; with `prune`, there is not
                one good row, so that everything would be deleted, or a damaged shard hides what follows.
        """
        return self._add_rows(path, None, prune=prune, strict=strict, progress=progress, copy=copy)

    def add_table(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        prune: bool = False,
        strict: bool = False,
        progress: bool = False,
        copy: bool = True,
    ) -> AddReport:
        """Add the rows of a `.jsonl`, `.csv` or `.parquet` file of any name and place; else as `add_folder`.

        Args:
            path: the table; `file_name` and `text` are its picture and caption, `id` its id, the rest are columns.
            images: the folder from which the paths in `file_name` start, and which they must not leave. Default: the
                table's own.
            prune, strict, progress, copy: as for `add_folder`.

        Raises:
            DataError: as for `add_folder`; or the file is no table.
        """
        if not Path(path).is_file() or Path(path).suffix.lower() not in TABLES:
            raise DataError(f"{path}: there is no such table ({', '.join(TABLES)}). For a folder there is add_folder.")
        return self._add_rows(path, images, prune=prune, strict=strict, progress=progress, copy=copy)

    def _add_rows(
        self, path: str | Path, images: str | Path | None, *, prune: bool, strict: bool, progress: bool, copy: bool
    ) -> AddReport:
        started = time.perf_counter()
        source = self._images.reference(Path(path))
        failed: list[InvalidRow] = []
        added = skipped = removed = 0
        seen = CompactSet()
        rows = read_catalog(path, images=images, strict=strict, on_error=failed.append)
        total = count_rows(path) if progress else 0

        # 1. What is there.
        with (
            progress_bar("Indexing", progress) as advance,
            closing(self._writer.add_rows(rows, source, seen, strict=strict, copy=copy)) as stored,
        ):
            for batch in stored:
                added, skipped = added + len(batch.fresh), skipped + len(batch.unchanged)
                failed.extend(batch.failed)
                advance(added + skipped + len(failed), total)

        # 2. What has left.
        if prune and (lost := next((bad for bad in failed if bad.hides_later_rows), None)):
            raise DataError(f"{source}: {lost.reason}, so nothing was pruned; what could be read is stored")
        if prune:
            removed = self._writer.prune(source, seen)

        # 3. The index, if searches would be slow without.
        if self._store.unindexed_count() >= OPTIMIZE_FROM:
            self.optimize()
        failed.sort(key=lambda bad: bad.line)
        report = AddReport(added, skipped, tuple(failed), time.perf_counter() - started, removed)
        _log.info("%s: %s from %s", self.location, report, source)
        return report

    # -------------------------------------------------------------------------------------------- searching

    def search(
        self,
        text: str | None = None,
        *,
        imagine: int = 0,
        image: ImageSource | Hit | Generated | None = None,
        like: str | int | Hit | Sequence[str | int | Hit] | None = None,
        unlike: str | int | Hit | Sequence[str | int | Hit] | None = None,
        without: str | Sequence[str] | None = None,
        vector: npt.ArrayLike | None = None,
        weights: tuple[float, float] | Mapping[str, float] | None = None,
        limit: int = 10,
        offset: int = 0,
        cursor: str | None = None,
        where: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        diversity: float | None = None,
        group_by: str | None = None,
        hybrid: bool | float = False,
    ) -> Page:
        """Find the items most similar to a text, an image, items, a vector, or to any mix of these.

            catalog.search("a summer dress", image=photo, unlike=["D-17"], without="stripes", where={"stock": True})

        A query of one part scores by the cosine. Several parts are mixed into one vector, each balanced by how far it
        tells this catalog's items apart, so that a text counts next to an image: `mixing` has the formula.

        Args:
            text: what to look for, in words.
            imagine: also draw the text, so many times up to 16, and look for what looks like that: for long queries
                that tell of much, at the time of that many images (`mixing`). The same search generates the same.
            image: what it should look like: a path, bytes, a PIL image, an array, a hit or a generated picture.
            like, unlike: items (ids or hits) to come close to, and to keep away from; they are no hits themselves.
            without: what it should not be, in words.
            vector: an embedding of this catalog's bundle: `bundle.dim` numbers of any length.
            weights: of text and image, (0.4, 0.6); or by name, {"text": 2, "without": 0.3}. Only ratios count. Default:
                1 for what is wanted, 0.5 for what is not.
            limit: how many hits at most, 1 to 10,000.
            offset: how many of the best to pass over.
            cursor: instead of offset, `page.cursor` of the page before: what is added or deleted between two pages then
                neither repeats nor hides a hit. The other arguments must be the same, but for limit.
            where: a filter on the columns (`store.filters`): `{"price": {"lt": 80}, "brand": ["a", "b"]}`.
            min_score: leave out what scores less.
            diversity: 0 to 1: how much variety counts against similarity, among the best max(100, 5 * limit)
                (`ranking.diversify`). 0.3 is a good start.
            group_by: a column of single values, of each of which only the best item is a hit; what lacks it stands
                alone.
            hybrid: also rank by the words of the captions (BM25), and fuse both rankings: True, or the share of the
                words between 0 and 1. For names and numbers that an encoder does not know. Scores are then of ranks.

        Returns:
            A Page of hits, best first; an empty one if nothing passes the filter.

        Raises:
            OptionError, FilterError, ImageError: an argument is not a valid one.
        """
        self._check_open()
        query = Query.of(
            text,
            imagine=imagine,
            image=image,
            like=like,
            unlike=unlike,
            without=without,
            vector=vector,
            weights=weights,
        )
        options = SearchOptions(
            limit=limit,
            offset=offset,
            cursor=cursor,
            where=where,
            min_score=min_score,
            diversity=diversity,
            group_by=group_by,
            hybrid=hybrid,
        )
        (page,) = self._searcher().search([query], options)
        if not page:
            warn_about_unknown_columns(self._store, options.clause)
        return page

    def search_batch(self, /, queries: Sequence[str | Mapping[str, Any]], **options: Any) -> list[Page]:
        """Several searches at once, encoded together: faster than one by one.

            catalog.search_batch(["red dress", {"text": "in blue", "image": photo}], limit=5)

        Args:
            queries: texts, or dictionaries of what `search` takes to tell what to look for (text, imagine, image, like,
                unlike, without, vector, weights).
            options: the other arguments of `search`, for all of them alike; not cursor.

        Returns:
            A page for each query; `took_ms` is of all together.
        """
        self._check_open()
        if isinstance(queries, (str, Mapping)) or not isinstance(queries, Iterable):
            raise OptionError("search_batch takes a list of queries; for one there is search")
        checked = [_called(Query.of, {"text": q} if isinstance(q, str) else q, "a query") for q in queries]
        if "cursor" in options:
            raise OptionError("a cursor belongs to one query: go on with search")
        shared = _called(SearchOptions, options, "search_batch")
        return self._searcher().search(checked, shared) if checked else []

    def _searcher(self) -> Searcher:
        with self._lazy_lock:
            serving = self._serving
            if self._searching is None or self._searching.store is not serving.store:
                self._searching = Searcher(
                    serving.store,
                    lambda: serving.encoder,
                    self._hit,
                    lambda texts, n: generating.draw_queries(serving.generator, texts, n),
                )
            return self._searching

    def browse(
        self,
        *,
        where: Mapping[str, Any] | None = None,
        order_by: str | None = None,
        limit: int = 10,
        offset: int = 0,
    ) -> Page:
        """The items that pass a filter, in the order of a column: cheapest first, newest first.

        Args:
            where: a filter on the columns.
            order_by: a column of numbers or of dates; "-price" for the highest first. Items without it are left out.
                Default: an order that is always the same.
            limit, offset: how many, and how many to pass over.

        Raises:
            OptionError, FilterError: an argument is not a valid one.
        """
        started = time.perf_counter()
        serving = self._writer.serving_now()
        check_page(limit, offset)
        clause = parse(where)
        found: Iterable[Record]
        if order_by is None:
            found = islice(chain.from_iterable(serving.store.scroll(where=clause)), offset, offset + limit)
        else:
            found = ordered(serving.store, order_by, clause, limit, offset)
        hits = tuple(self._hit(record.payload, 1.0) for record in found)
        if not hits:
            warn_about_unknown_columns(self._store, clause)
        return Page(hits, offset, limit, 1000 * (time.perf_counter() - started))

    def facets(
        self, column: str, *, where: Mapping[str, Any] | None = None, limit: int = 100
    ) -> dict[str | bool | int | float, int]:
        """How many items have each value of a column, the commonest first: `{"Nord": 17, "Acme": 4}`.

        An item whose column holds a list counts once for each of its values. Numbers, dates and captions are counted
        one by one, which takes a second or so for 100,000 items; other values than strings, booleans and numbers are
        not counted.

        Args:
            column: its name.
            where: a filter: only what passes it is counted.
            limit: how many values at most.

        Raises:
            OptionError, FilterError: an argument is not a valid one.
        """
        serving = self._writer.serving_now()
        check_page(limit, 0)
        return facet_counts(serving.store, column, parse(where), limit)

    def duplicates(self, threshold: float = 0.95, *, where: Mapping[str, Any] | None = None) -> list[tuple[Hit, ...]]:
        """Groups of items whose pictures look (almost) the same, the largest first.

        Two items belong together if the cosine of their embeddings is at least `threshold`, or if others link them.
        What threshold means "the same" depends on the bundle: start high. One search an item, so minutes for 100,000.

        Args:
            threshold: above 0, at most 1.
            where: a filter: only what passes it is compared.

        Returns:
            Groups of at least two; each hit's score is the cosine to the one most like it.

        Raises:
            OptionError, FilterError: an argument is not a valid one.
        """
        serving = self._writer.serving_now()
        groups = near_duplicates(serving.store, threshold, parse(where))
        return [tuple(self._hit(found.payload, found.score) for found in group) for group in groups]

    def get(self, id: str | int) -> Hit | None:
        """The item with this id, or None."""
        serving = self._writer.serving_now()
        records = serving.store.retrieve([key_of(id)])
        return self._hit(records[0].payload, 1.0) if records else None

    def count(self, where: Mapping[str, Any] | None = None) -> int:
        """How many items there are, or how many pass a filter."""
        serving = self._writer.serving_now()
        clause = parse(where)
        count = serving.store.count(clause)
        if not count:
            warn_about_unknown_columns(self._store, clause)
        return count

    def delete(self, ids: str | int | Hit | Sequence[str | int | Hit]) -> int:
        """Remove items and their pictures (never a file that was only referenced). Returns how many there were.

        Args:
            ids: of one item or several; hits will do.
        """
        keys = [key_of(id) for id in checked_ids(ids)]
        with self._writer.lock:
            self._check_open()
            records = self._store.retrieve(keys)
            self._writer.remove(records)
        return len(records)

    # -------------------------------------------------------------------------------------------- generating

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = "",
        n: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        width: int | None = None,
        height: int | None = None,
        long_prompts: str = "truncate",
        like: ImageSource | Hit | Generated | None = None,
        strength: float | None = None,
        mask: ImageSource | None = None,
        best_of: int | None = None,
        min_score: float | None = None,
        max_similarity: float | None = None,
        budget: int | None = None,
        safety: Callable[[Image.Image], Image.Image | None] | None = None,
        callback: Callable[[int, int], None] | None = None,
        preview: Callable[[Preview], None] | None = None,
    ) -> Generation:
        """Generate images, and rank them by their cosine with the prompt.

            catalog.generate("purple dotted boots", n=4, seed=7)
            catalog.generate("the same in red", like=hit, strength=0.5)          # a variation of an item
            catalog.generate("with a white collar", like=hit, mask="collar.png")   # repaint where the mask is bright
            catalog.generate("a green coat", n=4, best_of=16, max_similarity=0.97)  # the best that are no copies

        Threads that generate at the same time share the calls of the model. Each receives the images that it would
        receive alone (`Generator.generate` states how exactly).

        Args:
            prompt: what to generate; with a list, `n` images of each.
            negative_prompt: what guidance leads away from.
            n: number of images for each prompt, at least 1.
            seed: the k-th candidate of a prompt uses the seed `seed + k`; that seed with n=1 generates it alone.
                Default: a random seed, which the result reports.
            steps, guidance_scale, sampler: default: those of the bundle (`bundle.manifest.sampler`).
            guidance_rescale: 0 to 1; removes the contrast that a high guidance_scale adds.
            width, height: in pixels; default: the size that the model was trained at.
            long_prompts: "truncate" ignores what exceeds the model's tokens, with a warning; "chunk" encodes it too.
            like, strength, mask: start from an image; change it by this strength; repaint where the mask is bright.
            best_of: number of candidates for each prompt, of which the n with the highest scores are returned.
            min_score: reject candidates whose cosine with the prompt is lower.
            max_similarity: reject candidates whose cosine with a catalog item is higher: copies.
            budget: rejected candidates are replaced until a prompt has had this many. Default: four times the first
                round. A warning reports what is missing then.
            safety: called with each candidate; returns it, an image to use instead, or None to reject it.
            callback: called with (steps done, steps in total so far). An exception from it ends the generation.
            preview: called with a `Preview` after each step.

        Returns:
            A Generation: the images of one prompt after the other, the best first, each with its score and its nearest
            catalog item.

        Raises:
            OptionError: an argument is out of range; see `GenerationOptions`.
            ImageError: `like` or `mask` cannot be read.
            GenerationError: memory does not suffice, or the result is not finite.
            BusyError: too many generations are running.
        """
        snapshot = self._writer.serving_now()
        options = GenerationOptions(
            negative_prompt=negative_prompt,
            n=n,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            width=width,
            height=height,
            long_prompts=long_prompts,
            like=like,
            strength=strength,
            mask=mask,
            best_of=best_of,
            min_score=min_score,
            max_similarity=max_similarity,
            budget=budget,
            safety=safety,
        )
        return generating.generate(snapshot, prompt, options, self._hit, callback=callback, preview=preview)

    # -------------------------------------------------------------------------------------------- upkeep

    def optimize(self) -> None:
        """Build the search index over what was added, in a process of its own; other threads go on meanwhile.

        `add_folder` does so by itself where it pays. Doubles the space of the vectors (not of the pictures) until the
        catalog is closed or optimized again.
        """
        self._check_open()
        self._store.optimize()

    def reindex(self, bundle: Bundle | str | Path, *, progress: bool = False) -> int:
        """Re-encode every picture with another bundle, which then becomes the catalog's own. Returns how many.

        Until all new vectors are written, searches are answered with the old ones, and what is added or deleted counts;
        then all changes at once. A run that was cut short goes on where it stopped.

        On a server the new vectors go into a collection of their own, and the old one stays: other processes search it
        until they open the catalog again. None of them should write meanwhile.

        Raises:
            ImageError: a picture is gone or damaged; nothing is swapped then.
            StoreError: the catalog is being reindexed already.
            OptionError: no bundle is named.
        """
        if bundle is None:  # which would open the built-in bundle
            raise OptionError('reindex() needs the bundle to encode with: a folder, a Bundle, or "tiny"')
        new = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if not self._reindexing.acquire(blocking=False):
            raise StoreError(f"{self.location} is being reindexed already: wait for that to end.")
        try:
            return self._reindex(new, progress)
        finally:
            with self._writer.lock:
                self._writer.written = None
            self._reindexing.release()

    def _reindex(self, bundle: Bundle, progress: bool) -> int:
        from .reindexing import Reencoder

        self._check_open()
        before, vectors = self._serving, f"{VECTORS}-{bundle.fingerprint[:12]}"
        if bundle.fingerprint == before.reference.fingerprint:
            return 0
        # Left by a reindexing with a third bundle, or by one that was killed after its swap.
        for left in self.folder.glob(f"{VECTORS}*"):
            if left.name not in (self._file.vectors, vectors):
                shutil.rmtree(left)
        where = replace(self._where, quantization=getattr(before.store, "quantization", None))
        store = where.open(vectors, bundle.dim, bundle.fingerprint)
        after = Serving(store, self.folder, BundleRef.of(bundle, self.folder), bundle)
        try:
            # 1. Re-encode what the new shard does not hold yet, and note what is written meanwhile.
            reencoder = Reencoder(
                before.store,
                store,
                lambda record: self._images.load(record.payload[_SYSTEM]["uri"]),
                after.encoder,
                BATCH_SIZE,
            )
            with self._writer.lock:
                self._writer.written = set()
            total, done = before.store.count(), 0
            with progress_bar("Re-encoding", progress) as advance:
                for more in reencoder.all():
                    done += more
                    advance(done, total)
            if store.unindexed_count() >= OPTIMIZE_FROM:
                store.optimize()

            # 2. What was written meanwhile: most of it while writing goes on, the rest with the swap.
            for _ in range(CATCH_UP_ROUNDS):
                with self._writer.lock:
                    written, self._writer.written = self._writer.written, set()
                reencoder.some(written)
                if len(written) <= BATCH_SIZE:
                    break
            with self._writer.lock:
                self._check_open()
                reencoder.some(self._writer.written)

                # 3. Swap: the one write of catalog.json decides which shard and bundle the catalog has.
                old_vectors = self._file.vectors
                file = replace(self._file, bundle=after.reference, vectors=vectors)
                with CHANGING:
                    file.write(self.folder)
                self._file = file
                with self._lazy_lock:
                    self._writer.serving, self._searching = after, None
        except BaseException:
            store.close()
            raise
        # The old shard goes with the last that still asks it: whoever does holds its Serving.
        weakref.finalize(before, _let_go, before.store, self.folder / old_vectors)
        _log.info("%s: reindexed %d items with the bundle %s", self.location, done, bundle.name)
        return store.count()

    def export(self, path: str | Path, *, where: Mapping[str, Any] | None = None, progress: bool = False) -> int:
        """Write all items into one parquet file, with vectors and pictures (`archive`). Returns how many.

        Others search and write meanwhile; what they write may be in the file or not. Memory does not grow with the
        catalog. Needs the extra `parquet`.

        Args:
            path: the file; an earlier export of that name is replaced when the new one is whole.
            where: a filter: only what passes it is written.
            progress: show a progress bar.

        Raises:
            DataError: pyarrow is missing, or the path is a file of another kind.
            FilterError: the filter is not a valid one.
            ImageError: a picture is gone, or a referenced one has changed; nothing is written then.
            StoreError: the file cannot be written.
        """
        from .archive import write_archive

        serving, clause = self._writer.serving_now(), parse(where)
        reference = serving.reference
        bundle = {
            "name": reference.name,
            "path": reference.portable(self.folder),
            "fingerprint": reference.fingerprint,
            "dim": reference.dim,
        }
        total = serving.store.count(clause)
        with progress_bar("Exporting", progress) as advance:
            return write_archive(
                Path(path), serving.store, self._images, bundle, clause, lambda done: advance(done, total)
            )

    @classmethod
    def restore(
        cls,
        path: str | Path,
        location: str | Path = ":memory:",
        bundle: Bundle | str | Path | None = None,
        *,
        reencode: bool = False,
        progress: bool = False,
        **opening: Any,
    ) -> Catalog:
        """A new catalog from a file that `export` wrote, on any back end; open, as by `Catalog(location)`.

        A folder is there whole or not at all. Needs the extra `parquet`.

        Args:
            path: the file.
            location: as for `Catalog`; a new or empty folder, or a URL and a collection that is new or empty.
            bundle: the one that the file was exported with. Default: where that was then.
            reencode: encode the pictures anew, with `bundle`, which may then be any.
            progress: show a progress bar.
            opening: what else `Catalog` takes: quantization; for a URL images, collection, api_key, server.

        Raises:
            DataError: pyarrow is missing, or the file is no export, or damaged.
            BundleError: the bundle is not where it was: say where it is now.
            StoreError: the bundle is another one, or the location is not empty.
        """
        from .archive import Archive

        archive = Archive.open(path)
        chosen = archive.bundle_for(bundle, reencode)
        with new_place(location) as place:
            catalog = cls(place, chosen, **opening)
            try:
                if len(catalog):
                    raise StoreError(f"{location} is not empty: restore into another collection")
                catalog._restore(archive, reencode, progress)
            except BaseException:
                catalog.close()
                raise
            if place == location:
                return catalog
            catalog.close()
        return cls(location, chosen, **opening)

    def _restore(self, archive: Archive, reencode: bool, progress: bool) -> None:
        serving = self._serving

        def read(batch: list[ArchivedItem]) -> Prepared:
            items = []
            for archived in batch:
                item = item_of(archived.picture(), archived.text, archived.id, archived.payload)
                self._images.add(item.picture)
                source = None if archived.source is None else self._images.reference(Path(archived.source))
                pixels = serving.encoder.pixels(item.picture.decoded) if reencode else None
                items.append(replace(item, source=source, pixels=pixels, vector=None if reencode else archived.vector))
                item.picture.release()
            return Prepared(serving, [], items, [], [])

        done = 0
        batches = buffered_map(read, archive.batches(BATCH_SIZE), workers=os.cpu_count() or 1)
        with progress_bar("Restoring", progress) as advance, closing(batches):
            for batch in self._writer.store(batches, copy=True):
                done += len(batch.fresh)
                advance(done, archive.rows)
        if self._store.unindexed_count() >= OPTIMIZE_FROM:
            self.optimize()

    def info(self) -> dict[str, Any]:
        """Location, number of items, columns and what they hold (by the first 256 items), and the bundle: name, path,
        fingerprint, dimensions. Opens no model."""
        reference = self._file.bundle
        return {
            "location": self.location,
            "items": self.count(),
            "created": self._file.created,
            "columns": column_kinds(self._store),
            "bundle": {
                "name": reference.name,
                "path": str(reference.locate(self.folder)),
                "fingerprint": reference.fingerprint,
                "dim": reference.dim,
            },
        }

    # -------------------------------------------------------------------------------------------- asyncio

    @classmethod
    def aopen(cls, *args: Any, **kwargs: Any) -> Opening[Catalog]:
        """`Catalog(…)` in a thread, for `await` or for `async with Catalog.aopen("shop.catalog") as catalog`."""
        return Opening(partial(cls, *args, **kwargs))

    asearch = twin(search)
    asearch_batch = twin(search_batch)
    abrowse = twin(browse)
    afacets = twin(facets)
    aduplicates = twin(duplicates)
    aget = twin(get)
    acount = twin(count)
    aadd = twin(add)
    aadd_folder = twin(add_folder)
    aadd_table = twin(add_table)
    adelete = twin(delete)
    agenerate = cancellable(generate)
    aoptimize = twin(optimize)
    areindex = twin(reindex)
    aexport = twin(export)
    aclose = twin(close)

    async def __aenter__(self) -> Catalog:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def _check_open(self) -> None:
        self._writer.check_open()


def _let_go(store: Store, folder: Path) -> None:
    store.close()
    shutil.rmtree(folder, ignore_errors=True)


def _called(make: Callable[..., _T], arguments: Any, name: str) -> _T:
    """Call with keyword arguments that come from outside; unknown ones are told with the valid ones."""
    valid = list(inspect.signature(make).parameters)
    if not isinstance(arguments, Mapping) or not set(arguments) <= set(valid):
        wrong = (
            ", ".join(map(repr, set(arguments) - set(valid)))
            if isinstance(arguments, Mapping)
            else f"{arguments!r:.60}"
        )
        raise OptionError(f"{name} cannot be made of {wrong}: it takes {', '.join(valid)}")
    return make(**arguments)
