"""The façade: a catalogue of pictures that is searched and added to by one model, a bundle."""

from __future__ import annotations

import inspect
import math
import secrets
import shutil
import tempfile
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from .bundle import Bundle
from .catalogfile import BundleRef, CatalogFile
from .datasets.reader import BadRow, Row, count_rows, read_catalogue
from .duplicates import near_duplicates
from .encoder import Encoder
from .errors import BundleError, DataError, ImageError, OptionError, StoreError, UniDiffError
from .ids import key_of
from .images import ImageSource
from .imagestore import ImageStore, Picture
from .progress import progress_bar
from .query import Query, picture_of
from .ranking import elements, kind_of, value_at
from .results import AddReport, Generated, Generation, Hit, Page
from .search import SYSTEM as _SYSTEM
from .search import Searcher, Window, check_window
from .store import Record, Store
from .store.filters import Clause, Compare, column_path, columns, parse

if TYPE_CHECKING:
    from .generator import Generator, Preview
    from .store.connection import ServerOptions

__all__ = ["Catalog"]

BATCH_SIZE = 32

_RESERVED = ("id", "text", _SYSTEM)

_T = TypeVar("_T")


class Catalog:
    """A collection of pictures with captions and columns, searched and extended by one bundle.

        with Catalog("shop.catalog", bundle="bundles/shop") as catalog:
            catalog.add_folder("products/")
            hits = catalog.search("red striped dress", where={"price": {"lt": 80}})
            pictures = catalog.generate("purple dotted boots", n=4, seed=7)

    Everything is in the one folder `location`, which may be moved; `bundle` is remembered. Safe to use from several
    threads; one process at a time may hold a folder.

    Args:
        location: a folder, made if it does not exist; ":memory:", which is gone at `close`; or the http(s) URL of a
            Qdrant server or cluster.
        bundle: a folder that `unidiff-export` wrote, or an open Bundle. Default: the one that the catalogue was made
            with; for a new catalogue "tiny", the built-in model.
        create: whether a missing folder is made; if not, it is an error.
        images: only with a URL, and needed there: the folder that keeps the pictures.
        collection, api_key, server: only with a URL: the collection's name, the key, and `ServerOptions`: timeouts,
            retries, gRPC; shards, replicas and quantisation of a new collection.

    Raises:
        StoreError: the location is no catalogue, is in use, or was made with another bundle.
        BundleError: the bundle is missing or damaged.
    """

    def __init__(
        self,
        location: str | Path = ":memory:",
        bundle: Bundle | str | Path | None = None,
        *,
        create: bool = True,
        images: str | Path | None = None,
        collection: str = "catalog",
        api_key: str | None = None,
        server: ServerOptions | None = None,
    ) -> None:
        self._write_lock = threading.RLock()
        self._lazy_lock = threading.RLock()
        self._bundle: Bundle | None = None
        self._searching: Searcher | None = None
        self._warned = False
        self._closed = False

        # 1. Where: vectors in a folder or on a server, pixels and catalog.json in a folder.
        self.location = str(location)
        self._url = self.location if self.location.startswith(("http://", "https://")) else None
        self._temporary: weakref.finalize[..., Any] | None = None
        if self._url:
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
            raise StoreError(f"There is no catalogue at {self.folder}. `unidiff index FOLDER {self.folder}` makes one.")
        if bundle is not None or file is None:
            self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if file is None:
            file = CatalogFile.new(cast(Bundle, self._bundle), self.folder)
            file.write(self.folder)
        elif self._bundle is not None:
            file = self._adopt(file, self._bundle)
        self._file = file

        # 3. The vectors and the pixels.
        self._images = ImageStore(self.folder)
        self._store = self._open_store(file, collection, api_key, server)

    def _open_store(
        self, file: CatalogFile, collection: str, api_key: str | None, options: ServerOptions | None
    ) -> Store:
        if self._url:
            from .store.connection import ServerOptions, connect
            from .store.server import ServerStore

            options = options or ServerOptions()
            client = connect(self._url, options, api_key)
            return ServerStore(client, collection, file.bundle.dim, file.bundle.fingerprint, options)
        from .store.edge import EdgeStore

        return EdgeStore(self.folder / file.vectors, file.bundle.dim)

    def _adopt(self, file: CatalogFile, bundle: Bundle) -> CatalogFile:
        """Check that a bundle is the one that made the vectors, and remember where it is now."""
        made_with = file.bundle
        if bundle.fingerprint != made_with.fingerprint:
            sizes = f" and of {made_with.dim} dimensions, not {bundle.dim}" if bundle.dim != made_with.dim else ""
            raise StoreError(
                f'{self.folder} was indexed with the bundle "{made_with.name}" (fingerprint '
                f"{made_with.fingerprint[:12]}), and {bundle.path} is another one (fingerprint "
                f"{bundle.fingerprint[:12]}){sizes}: their vectors do not compare. To re-encode the catalogue, open it "
                f"without bundle= and call catalog.reindex({str(bundle.path)!r})."
            )
        found = replace(file, bundle=BundleRef.of(bundle, self.folder))
        if found != file:
            found.write(self.folder)
        return found

    # -------------------------------------------------------------------------------------------- life

    @property
    def bundle(self) -> Bundle:
        """The model; opened when first needed. Raises BundleError if it is missing or has changed."""
        with self._lazy_lock:
            if self._bundle is None:
                reference = self._file.bundle
                path = reference.locate(self.folder)
                if not path.is_dir():
                    raise BundleError(
                        f'The bundle "{reference.name}" that {self.folder} was indexed with is not at {path}. '
                        "Put it back, or say where it is now: Catalog(location, bundle=…)."
                    )
                bundle = Bundle.open(path)
                self._file = self._adopt(self._file, bundle)
                self._bundle = bundle
            return self._bundle

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.bundle)

    @cached_property
    def _generator(self) -> Generator:
        from .generator import Generator  # with its samplers, not needed for searching

        with self._lazy_lock:  # threads that come first at the same time must share one
            if "_generator" not in self.__dict__:
                self.__dict__["_generator"] = Generator(self.bundle)
            generator: Generator = self.__dict__["_generator"]
            return generator

    def close(self) -> None:
        """Write out everything and let go of the folder. May be called twice; anything else afterwards is an error."""
        with self._write_lock:
            if not self._closed:
                self._closed = True
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
        return True  # an empty catalogue is still a catalogue

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
            copy: whether image files are copied into the catalogue or only referenced where they are.

        Returns:
            The ids.

        Raises:
            OptionError: lengths do not match, or an id, caption or payload is not a valid one.
            ImageError: a picture cannot be read.
            StoreError: an embedding is not finite, or the disk is full.
        """
        items = list(_items(images, texts, ids, payloads))
        fresh: list[_Item] = []
        records: list[Record] = []
        replaced: dict[str, str] = {}
        for batch in _batched(items, BATCH_SIZE):
            changed, old = self._changed(batch)
            records += self._encode(changed, copy)
            fresh += changed
            replaced |= old
        self._commit(records, fresh, replaced, copy)
        return [item.id for item in items]

    def add_folder(
        self, path: str | Path, *, strict: bool = False, progress: bool = False, copy: bool = True
    ) -> AddReport:
        """Add a folder of images with `metadata.jsonl`, `.csv` or `.parquet` beside them, or of webdataset shards.

        Rows with an `id` column keep it; the others get a hash of picture and caption. What is there already and has
        not changed is passed over, so an interrupted run is simply started again.

        Args:
            path: the folder, or a single `.tar` shard (`datasets.reader` tells the formats).
            strict: raise at the first bad row; what came before it stays stored.
            progress: show a progress bar.
            copy: whether the images are copied into the catalogue or only referenced where they are.

        Raises:
            DataError: the folder or its metadata file is missing; in strict mode, a bad row.
        """
        started = time.perf_counter()
        failed: list[BadRow] = []
        added = skipped = 0
        rows = read_catalogue(path, strict=strict, on_error=failed.append)
        total = count_rows(path) if progress else 0
        with progress_bar("Indexing", progress) as advance, ThreadPoolExecutor(1) as reading:
            # One batch is read, decoded and thumbnailed while the one before it is encoded and stored.
            batches = _batched(rows, BATCH_SIZE)
            job = reading.submit(self._prepare, next(batches, []), strict, copy)
            while (prepared := job.result()).seen:
                job = reading.submit(self._prepare, next(batches, []), strict, copy)
                records = self._encode(prepared.fresh, copy)
                self._commit(records, prepared.fresh, prepared.replaced, copy)
                added, skipped = added + len(records), skipped + prepared.skipped
                failed.extend(prepared.failed)
                advance(added + skipped + len(failed), total)
        return AddReport(added, skipped, tuple(sorted(failed, key=lambda bad: bad.line)), time.perf_counter() - started)

    def _prepare(self, rows: list[Row], strict: bool, copy: bool) -> _Prepared:
        """Read rows, drop those that are stored already, decode the others and keep their pixels."""
        items: list[_Item] = []
        failed: list[BadRow] = []

        def fail(name: str, line: int, error: UniDiffError) -> None:
            bad = BadRow(line, name, str(error))
            if strict:
                raise DataError(str(bad)) from error
            failed.append(bad)

        for row in rows:
            payload = dict(row.payload)
            try:
                item = _item(Picture(row.image()), row.text, payload.pop("id", None), payload)
                items.append(replace(item, line=row.line))
            except (DataError, ImageError, OptionError) as error:
                fail(row.name, row.line, error)
        fresh, replaced = self._changed(items)
        names = {row.line: row.name for row in rows}
        decoded: list[_Item] = []
        for item in fresh:
            try:
                self._images.add(item.picture, copy=copy)
                decoded.append(item)
            except ImageError as error:
                fail(names[item.line], item.line, error)
        skipped = len(items) - len(fresh)
        return _Prepared(len(rows), decoded, replaced, skipped, failed)

    def _changed(self, items: Sequence[_Item]) -> tuple[list[_Item], dict[str, str]]:
        """The items that are not stored yet just so; and the pictures (sha256 -> uri) that they take the place of."""
        self._check_open()
        stored = {record.id: record.payload for record in self._store.retrieve([item.key for item in items])}
        fresh: list[_Item] = []
        replaced: dict[str, str] = {}
        for item in items:
            old = stored.get(item.key)
            system = old[_SYSTEM] if old else {}
            if old == {**item.columns, _SYSTEM: {**system, "sha256": item.picture.sha256}}:
                continue
            fresh.append(item)
            if old and system["sha256"] != item.picture.sha256:
                replaced[system["sha256"]] = system["uri"]
        return fresh, replaced

    def _encode(self, items: Sequence[_Item], copy: bool) -> list[Record]:
        if not items:
            return []
        vectors = self._encoder.encode_images([item.picture.image for item in items])
        self._warn_of_real_pictures(items)
        records = []
        for item, vector in zip(items, vectors, strict=True):
            system = {"sha256": item.picture.sha256, "uri": self._images.add(item.picture, copy=copy)}
            records.append(Record(item.key, vector, {**item.columns, _SYSTEM: system}))
            item.picture.release()
        return records

    def _commit(self, records: Sequence[Record], items: Sequence[_Item], replaced: dict[str, str], copy: bool) -> None:
        with self._write_lock:
            self._check_open()
            for item in items:  # once more, as a `delete` may have removed the same picture meanwhile
                self._images.add(item.picture, copy=copy)
            for batch in _batched(records, 256):
                self._store.upsert(batch)
            self._release(replaced)

    def _release(self, pictures: dict[str, str]) -> None:
        """Delete pictures (sha256 -> uri) that no item shows any more."""
        for sha256, uri in pictures.items():
            if not self._store.count(Compare(f"{_SYSTEM}.sha256", "eq", sha256)):
                self._images.remove(sha256, uri)

    def _warn_of_real_pictures(self, items: Sequence[_Item]) -> None:
        if self._warned or not self.bundle.synthetic:
            return
        from .datasets.synthetic import CATALOGUES

        if any(item.columns.get("catalogue") not in CATALOGUES and not item.columns.get("generated") for item in items):
            self._warned = True
            warnings.warn(
                f'The bundle "{self.bundle.name}" was trained on drawn, synthetic products only: on other pictures '
                "its results mean little. Fine-tune on your own data (unidiff-train, unidiff-export), use that bundle.",
                stacklevel=4,
            )

    # -------------------------------------------------------------------------------------------- searching

    def search(
        self,
        text: str | None = None,
        *,
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
        tells this catalogue's items apart, so that words are heard beside a picture: `query` has the formula.

        Args:
            text: what to look for, in words.
            image: what it should look like: a path, bytes, a PIL image, an array, a hit or a generated picture.
            like, unlike: items (ids or hits) to come close to, and to keep away from; they are no hits themselves.
            without: what it should not be, in words.
            vector: an embedding of this catalogue's bundle: `bundle.dim` numbers of any length.
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
        query = Query.of(text, image=image, like=like, unlike=unlike, without=without, vector=vector, weights=weights)
        window = Window.of(
            limit=limit,
            offset=offset,
            cursor=cursor,
            where=where,
            min_score=min_score,
            diversity=diversity,
            group_by=group_by,
            hybrid=hybrid,
        )
        (page,) = self._searcher().search([query], window)
        if not page:
            self._explain_nothing(window.where)
        return page

    def search_batch(self, queries: Sequence[str | Mapping[str, Any]], **window: Any) -> list[Page]:
        """Several searches at once, encoded together: faster than one by one.

            catalog.search_batch(["red dress", {"text": "in blue", "image": photo}], limit=5)

        Args:
            queries: texts, or dictionaries of what `search` takes to tell what to look for (text, image, like, unlike,
                without, vector, weights).
            window: the other arguments of `search`, for all of them alike; not cursor.

        Returns:
            A page for each query; `took_ms` is of all together.
        """
        self._check_open()
        if isinstance(queries, (str, Mapping)):
            raise OptionError("search_batch takes a list of queries; for one there is search")
        checked = [_called(Query.of, {"text": q} if isinstance(q, str) else q, "a query") for q in queries]
        if "cursor" in window:
            raise OptionError("a cursor belongs to one query: go on with search")
        shown = _called(Window.of, window, "search_batch")
        return self._searcher().search(checked, shown) if checked else []

    def _searcher(self) -> Searcher:
        with self._lazy_lock:
            if self._searching is None or self._searching.store is not self._store:
                self._searching = Searcher(self._store, lambda: self._encoder, self._hit)
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
        self._check_open()
        check_window(limit, offset)
        clause = parse(where)
        found: Iterable[Record]
        if order_by is None:
            found = islice(chain.from_iterable(self._store.scroll(where=clause)), offset, offset + limit)
        else:
            column = order_by.removeprefix("-")
            kind = {"number": "float", "date": "datetime"}.get(self._kind_of(column))
            if kind is None:
                raise OptionError(f"order_by={order_by!r}: only a column of numbers or of dates has an order")
            found = iter(
                self._store.ordered(
                    column_path(column),
                    kind,
                    descending=order_by.startswith("-"),
                    limit=limit,
                    offset=offset,
                    where=clause,
                )
            )
        hits = tuple(self._hit(record.payload, 1.0) for record in found)
        if not hits:
            self._explain_nothing(clause)
        return Page(hits, offset, limit, 1000 * (time.perf_counter() - started))

    def facets(
        self, column: str, *, where: Mapping[str, Any] | None = None, limit: int = 100
    ) -> dict[str | bool | int | float, int]:
        """How many items have each value of a column, the commonest first: `{"Nord": 17, "Acme": 4}`.

        An item whose column holds a list counts once for each of its values. Columns of numbers are counted one by one,
        which takes a second or so for 100,000 items; other values than strings, booleans and numbers are not counted.

        Args:
            column: its name.
            where: a filter: only what passes it is counted.
            limit: how many values at most.

        Raises:
            OptionError, FilterError: an argument is not a valid one.
        """
        self._check_open()
        check_window(limit, 0)
        clause, kind = parse(where), self._kind_of(column)
        if kind in ("string", "date", "boolean"):
            engine_kind = "bool" if kind == "boolean" else "keyword"
            counts = self._store.facet(column_path(column), engine_kind, limit=limit, where=clause)
            return dict(sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0]))))
        counter: Counter[Any] = Counter()
        for record in chain.from_iterable(self._store.scroll(1024, clause)):
            counter.update({v for v in elements(value_at(record.payload, column)) if isinstance(v, (str, int, float))})
        return dict(counter.most_common(limit))

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
        self._check_open()
        groups = near_duplicates(self._store, threshold, parse(where))
        return [tuple(self._hit(found.payload, found.score) for found in group) for group in groups]

    def get(self, id: str | int) -> Hit | None:
        """The item with this id, or None."""
        self._check_open()
        records = self._store.retrieve([key_of(id)])
        return self._hit(records[0].payload, 1.0) if records else None

    def count(self, where: Mapping[str, Any] | None = None) -> int:
        """How many items there are, or how many pass a filter."""
        self._check_open()
        clause = parse(where)
        count = self._store.count(clause)
        if not count:
            self._explain_nothing(clause)
        return count

    def delete(self, ids: str | int | Sequence[str | int]) -> int:
        """Remove items and their pictures (never a file that was only referenced). Returns how many there were."""
        with self._write_lock:
            self._check_open()
            records = self._store.retrieve([key_of(id) for id in _listed(ids)])
            self._store.delete([record.id for record in records])
            self._release({r.payload[_SYSTEM]["sha256"]: r.payload[_SYSTEM]["uri"] for r in records})
        return len(records)

    def _columns(self) -> dict[str, str]:
        """The columns that some of the items have, and what they hold."""
        first = next(self._store.scroll(256), [])
        kinds: dict[str, str] = {}
        for name, value in ((name, value) for record in first for name, value in record.payload.items()):
            if name != _SYSTEM and (kind := kind_of(value)):
                kinds.setdefault(name, kind)
        return dict(sorted(kinds.items()))

    def _kind_of(self, column: str) -> str:
        """What a column holds, by the first items that have it; "" if none has."""
        has_it = Compare(column_path(column), "exists", True)
        kinds = (kind_of(value_at(record.payload, column)) for record in next(self._store.scroll(16, has_it), []))
        kind = next(filter(None, kinds), "")
        if not kind:
            self._explain_nothing(has_it)
        return kind

    def _explain_nothing(self, where: Clause | None) -> None:
        """Say so if a filter let nothing through because it asks for a column that no item has."""
        if where is None or not self._store.count():
            return
        for column in columns(where):
            if not self._store.count(Compare(column, "exists", True)):
                known = ", ".join(self._columns())
                warnings.warn(f'No item has a column "{column}". There are: {known}.', stacklevel=3)

    def _hit(self, payload: dict[str, Any], score: float) -> Hit:
        columns = {name: value for name, value in payload.items() if name not in _RESERVED}
        system = payload[_SYSTEM]
        return Hit(payload["id"], score, payload.get("text"), columns, system["uri"], system["sha256"], self._images)

    # -------------------------------------------------------------------------------------------- generating

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
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
        """Draw new pictures, and rank them by how well they agree with the prompt.

            catalog.generate("purple dotted boots", n=4, seed=7)
            catalog.generate("the same in red", like=hit, strength=0.5)          # a variation of an item
            catalog.generate("with a white collar", like=hit, mask="collar.png")   # only what is bright in the mask
            catalog.generate("a green coat", n=4, best_of=16, max_similarity=0.97)  # the best that are no copies

        Threads that generate at the same time share the model's calls, and get what each would get alone (see
        `generator.Generator.generate`, which also tells the ranges of its arguments).

        Args:
            prompt: what to draw; a list draws `n` pictures of each.
            negative_prompt: what to keep away from.
            n: how many pictures, at least 1.
            seed: makes them again: the k-th picture drawn has the seed `seed + k`, and with n=1 that seed draws it
                alone. Default: a random one, which the result tells.
            steps, guidance_scale, sampler: default: the bundle's own (`bundle.manifest["sampler"]`).
            guidance_rescale: 0 to 1; takes back the contrast that a high guidance_scale adds.
            width, height: pixels; default: the model's own.
            long_prompts: past the model's tokens, "truncate" with a warning, or "chunk".
            like, strength, mask: start from a picture, keep it to that degree, repaint only the bright part of a mask.
            best_of: draw so many for each prompt and keep the n that the encoder ranks highest.
            min_score: refuse pictures whose cosine with the prompt is less.
            max_similarity: refuse pictures whose cosine with some catalogue item is more: copies.
            budget: refused pictures are drawn anew, until so many are drawn for one prompt; default: four times the
                first draw. What is then short is told by a warning.
            safety: called with each picture; returns it, another in its place, or None to refuse it.
            callback: called with (steps done, steps in all so far); what it raises ends the generation.
            preview: called with a `generator.Preview` after each step.

        Returns:
            A Generation: prompt after prompt, of each the best first, with its score and its nearest catalogue item.

        Raises:
            OptionError, ImageError, GenerationError: an argument is not a valid one.
            BusyError: too many generations are under way.
        """
        from .editing import default_strength
        from .selection import Demands, select

        started = time.perf_counter()
        self._check_open()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for each in prompts:
            if not isinstance(each, str) or not each.strip():
                raise OptionError(f"prompt={each!r}: it must be words that say what to draw")
        seed = secrets.randbelow(2**32) if seed is None else seed
        generator = self._generator
        settings = generator.settings(
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            width=width,
            height=height,
        )
        original, original_sha256 = _readable("like", like)
        repaint, repaint_sha256 = _readable("mask", mask)
        if original is not None and strength is None:
            strength = default_strength(masked=repaint is not None)
        demands = Demands(n, best_of, min_score, max_similarity, budget, safety)
        steps_before = steps_seen = 0

        def count_on(done: int, total: int) -> None:
            nonlocal steps_seen
            steps_seen = steps_before + total
            if callback is not None:
                callback(steps_before + done, steps_seen)

        # 1. Draw, compare each picture with its prompt and with what the catalogue holds, draw again what is refused.
        def draw(prompts: Sequence[str], offset: int, count: int) -> list[Image.Image]:
            nonlocal steps_before
            steps_before = steps_seen
            return generator.generate(
                prompts,
                negative_prompt=negative_prompt,
                n=count,
                seed=seed + offset,
                **asdict(settings),
                long_prompts=long_prompts,
                like=original,
                strength=strength,
                mask=repaint,
                callback=count_on if callback is not None else None,
                preview=preview,
            )

        selections = select(prompts, draw, self._judge, demands)

        # 2. Tell how each was made.
        pictures = tuple(
            Generated(
                image=candidate.image,
                score=candidate.score,
                nearest=candidate.nearest,
                prompt=selection.prompt,
                negative_prompt=negative_prompt,
                seed=seed + candidate.offset,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                guidance_rescale=settings.guidance_rescale,
                sampler=settings.sampler,
                long_prompts=long_prompts,
                bundle=self.bundle.fingerprint,
                like=original_sha256,
                strength=strength,
                mask=repaint_sha256,
                replaced=candidate.replaced,
            )
            for selection in selections
            for candidate in selection.kept
        )
        refused = sum((selection.refused for selection in selections), Counter[str]())
        drawn = sum(selection.drawn for selection in selections)
        return Generation(pictures, 1000 * (time.perf_counter() - started), drawn, dict(refused))

    def _judge(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[tuple[float, Hit | None]]:
        """Of each picture the cosine with its prompt, and the nearest item."""
        if not images:
            return []
        vectors = self._encoder.encode_images(images)
        words = {prompt: self._encoder.encode_texts([prompt])[0] for prompt in dict.fromkeys(prompts)}
        judged: list[tuple[float, Hit | None]] = []
        for prompt, vector in zip(prompts, vectors, strict=True):
            found = self._store.query(vector, limit=1)
            nearest = self._hit(found[0].payload, found[0].score) if found else None
            judged.append((float(vector @ words[prompt]), nearest))
        return judged

    # -------------------------------------------------------------------------------------------- upkeep

    def optimize(self) -> None:
        """Build the search index over what was added, in a process of its own; other threads go on meanwhile.

        `add_folder` does so by itself where it pays. Doubles the space of the vectors (not of the pictures) until the
        catalogue is closed or optimised again.
        """
        self._check_open()
        self._store.optimize()

    def reindex(self, bundle: Bundle | str | Path, *, progress: bool = False) -> int:
        """Re-encode every picture with another bundle, which then becomes the catalogue's own. Returns how many.

        Searches are answered with the old vectors until all new ones are written; then both are swapped at once. A run
        that was cut short goes on where it stopped.

        Raises:
            ImageError: a picture is gone or damaged; nothing is swapped then.
            StoreError: the catalogue is on a server: index into a new collection there.
        """
        if self._url:
            raise StoreError(
                "A catalogue on a server is not reindexed in place: make a new one, Catalog(url, bundle, collection=…)"
            )
        from .store.edge import EdgeStore

        new = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        with self._write_lock:
            self._check_open()
            old_store, old_vectors = self._store, self._file.vectors
            vectors = f"vectors-{new.fingerprint[:12]}"
            if vectors == old_vectors or new.fingerprint == self._file.bundle.fingerprint:
                return 0
            encoder = Encoder(new)
            store = EdgeStore(self.folder / vectors, new.dim)

            # 1. Re-encode what the new shard does not hold yet.
            try:
                total = old_store.count()
                with progress_bar("Re-encoding", progress) as advance:
                    for batch in old_store.scroll(BATCH_SIZE):
                        there = {
                            record.id: record.payload for record in store.retrieve([record.id for record in batch])
                        }
                        todo = [record for record in batch if there.get(record.id) != record.payload]
                        pictures = [self._images.load(record.payload[_SYSTEM]["uri"]) for record in todo]
                        if todo:
                            encoded = zip(todo, encoder.encode_images(pictures), strict=True)
                            store.upsert([replace(record, vector=vector) for record, vector in encoded])
                        advance(store.count(), total)
                for batch in store.scroll():  # what was deleted since a run that was cut short
                    kept = {record.id for record in old_store.retrieve([record.id for record in batch])}
                    store.delete([record.id for record in batch if record.id not in kept])
            except BaseException:
                store.close()
                raise

            # 2. Swap: the one write of catalog.json decides which shard and bundle the catalogue has.
            self._file = replace(self._file, bundle=BundleRef.of(new, self.folder), vectors=vectors)
            self._file.write(self.folder)
            with self._lazy_lock:
                self._bundle = new
                self.__dict__["_encoder"] = encoder
                self.__dict__.pop("_generator", None)
            self._store = store
            old_store.close()
            shutil.rmtree(self.folder / old_vectors, ignore_errors=True)
            return store.count()

    def info(self) -> dict[str, Any]:
        """Location, number of items, columns and what they hold (by the first 256 items), and the bundle: name, path,
        fingerprint, dimensions. Opens no model."""
        reference = self._file.bundle
        return {
            "location": self.location,
            "items": self.count(),
            "created": self._file.created,
            "columns": self._columns(),
            "bundle": {
                "name": reference.name,
                "path": str(reference.locate(self.folder)),
                "fingerprint": reference.fingerprint,
                "dim": reference.dim,
            },
        }

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"The catalogue {self.location} is closed.")


# ------------------------------------------------------------------------------------------------ items


@dataclass(frozen=True)
class _Item:
    """One row on its way in, checked."""

    id: str | int
    picture: Picture
    columns: dict[str, Any]  # id, text and payload, as they are stored
    line: int = 0  # in the metadata file of a folder

    @property
    def key(self) -> str:
        return key_of(self.id)


@dataclass(frozen=True)
class _Prepared:
    """A batch of a folder: how many rows were read, what must be encoded, what it replaces, what is left out."""

    seen: int
    fresh: list[_Item]
    replaced: dict[str, str]
    skipped: int
    failed: list[BadRow]


def _item(picture: Picture, text: str | None, id: Any, payload: Mapping[str, Any]) -> _Item:
    for name in _RESERVED:
        if name in payload:
            raise OptionError(f'"{name}" cannot be a column of a payload: captions go into texts=, ids into ids=')
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise OptionError(f"the caption {text!r} is empty; leave texts= out where there are no captions")
    if id is None:
        import hashlib

        id = hashlib.sha256(f"{picture.sha256}\0{text or ''}".encode()).hexdigest()[:32]
    key_of(id)
    columns = {"id": id} | ({} if text is None else {"text": text.strip()}) | _jsonable(payload, "payload")
    return _Item(id, picture, columns)


def _items(images: Any, texts: Any, ids: Any, payloads: Any) -> Iterator[_Item]:
    """One item for each picture; every argument may be one value or a sequence."""
    sources = [images] if _is_single(images) else list(images)
    columns: dict[str, list[Any]] = {}
    for name, values in {"texts": texts, "ids": ids, "payloads": payloads}.items():
        single = values is None or isinstance(values, (str, int, Mapping)) or not isinstance(values, Iterable)
        columns[name] = [values] * (len(sources) if values is None else 1) if single else list(values)
        if len(columns[name]) != len(sources):
            raise OptionError(f"{len(sources)} images but {len(columns[name])} {name}: give one for each image")
    ids = [id.item() if isinstance(id, np.generic) else id for id in columns.pop("ids")]
    for key, times in Counter(key_of(id) for id in ids if id is not None).items():
        if times > 1:
            raise OptionError(f"the id {next(id for id in ids if key_of(id) == key)!r} is given {times} times")
    for source, text, payload, id in zip(sources, *columns.values(), ids, strict=True):
        picture, payload = picture_of(source), {} if payload is None else payload
        if not isinstance(payload, Mapping):
            raise OptionError(f"a payload is a dictionary of columns, not {payload!r}")
        if isinstance(source, Generated):
            text, payload = text or source.prompt, {**source.payload, **payload}
        elif isinstance(source, Hit):
            text, payload, id = text or source.text, {**source.payload, **payload}, source.id if id is None else id
        yield _item(picture, text, id, payload)
        picture.release()  # a long list of files is hashed here and read again, a batch at a time


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(
        images, (str, PathLike, bytes, bytearray, memoryview, Image.Image, Hit, Generated)
    ) or not isinstance(images, Iterable)


def _readable(name: str, source: Any) -> tuple[Image.Image, str] | tuple[None, None]:
    """A picture that a generation starts from, and its SHA-256; an error says which argument cannot be read."""
    if source is None:
        return None, None
    try:
        picture = picture_of(source)
        return picture.image, source.sha256 if isinstance(source, Hit) else picture.sha256
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


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


def _listed(ids: str | int | Sequence[str | int]) -> Sequence[str | int]:
    return [ids] if isinstance(ids, (str, int)) else ids


def _jsonable(value: Any, name: str) -> Any:
    """A payload as JSON holds it: numpy scalars and arrays unwrapped, dates as ISO 8601."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return _jsonable(value.tolist(), name)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _jsonable(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, name) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise OptionError(
        f"{name} is {value!r:.60}: a column holds JSON values (strings, finite numbers, true, null, lists, objects)"
    )


def _batched(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
