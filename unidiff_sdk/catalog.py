"""The façade: a catalogue of pictures that is searched and added to by one model, a bundle."""

from __future__ import annotations

import math
import secrets
import shutil
import tempfile
import threading
import time
import uuid
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from PIL import Image

from .bundle import Bundle
from .catalogfile import BundleRef, CatalogFile
from .datasets.reader import BadRow, Row, count_rows, read_catalogue
from .encoder import Encoder
from .errors import BundleError, DataError, ImageError, OptionError, StoreError, UniDiffError
from .images import ImageSource
from .imagestore import ImageStore, Picture
from .progress import progress_bar
from .results import AddReport, Generated, Generation, Hit, Page
from .store import Record, Store, Vector
from .store.filters import Compare, parse

if TYPE_CHECKING:
    from .generator import Generator
    from .store.connection import ServerOptions

__all__ = ["Catalog"]

BATCH_SIZE = 32
MAX_LIMIT = 10_000

_ID_NAMESPACE = uuid.UUID("6f1c1f0e-6a52-5c0e-9d5a-3b8f0a1c7e42")
_SYSTEM = "_unidiff"  # the key, in a stored payload, of what is the catalogue's own: sha256 and uri
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

        return Generator(self.bundle)

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
        weights: tuple[float, float] = (0.5, 0.5),
        limit: int = 10,
        offset: int = 0,
        where: Mapping[str, Any] | None = None,
    ) -> Page:
        """Find the items most similar to a text, to an image, or to both.

        With both, an item's score is `weights[0] * cos(text, item) + weights[1] * cos(image, item)`: a linear mix of
        the two cosines, which the store computes as one dot product with the mixed vector. CLIP's two modalities lie
        apart, so cosines with images are larger and spread wider than those with texts: give the text more weight to
        be heard.

        Args:
            text: what to look for, in words.
            image: what it should look like: a path, bytes, a PIL image, an array, a hit or a generated picture.
            weights: of text and image, if both are given; finite and not negative.
            limit: how many hits at most, 1 to 10,000.
            offset: how many of the best to pass over.
            where: a filter on the columns (`store.filters`): `{"price": {"lt": 80}, "brand": ["a", "b"]}`.

        Returns:
            A Page of hits, best first; an empty one if nothing passes the filter.

        Raises:
            OptionError, FilterError, ImageError: an argument is not a valid one.
        """
        started = time.perf_counter()
        self._check_open()
        if not 1 <= limit <= MAX_LIMIT:
            raise OptionError(f"limit={limit}: it must be from 1 to {MAX_LIMIT:,}")
        if offset < 0:
            raise OptionError(f"offset={offset}: it must not be negative")
        clause = parse(where)
        query = self._query(text, image, weights)
        found = self._store.query(query, limit=limit, offset=offset, where=clause)
        hits = tuple(self._hit(result.payload, result.score) for result in found)
        return Page(hits, offset, limit, 1000 * (time.perf_counter() - started))

    def _query(self, text: str | None, image: Any, weights: tuple[float, float]) -> Vector:
        if text is None and image is None:
            raise OptionError("search for something: a text, an image=, or both")
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise OptionError(f"text={text!r}: it must be words to look for")
        if image is None:
            return self._encode_text(cast(str, text))
        if text is None:
            return self._encode_query_image(image)
        try:
            of_text, of_image = (float(weight) for weight in weights)
        except (TypeError, ValueError):
            of_text = of_image = math.nan
        if not (0 <= of_text < math.inf and 0 <= of_image < math.inf and of_text + of_image > 0):
            raise OptionError(
                f"weights={weights!r}: give two numbers for text and image, not negative, such as (0.4, 0.6)"
            )
        mix = of_text * self._encode_text(text) + of_image * self._encode_query_image(image)
        return mix.astype(np.float32)

    def _encode_text(self, text: str) -> Vector:
        return cast(Vector, self._encoder.encode_texts([text])[0])

    def _encode_query_image(self, image: Any) -> Vector:
        if isinstance(image, Hit):
            for record in self._store.retrieve([_key(image.id)]):
                if record.payload[_SYSTEM]["sha256"] == image.sha256:
                    return record.vector
        return cast(Vector, self._encoder.encode_images([_picture(image).image])[0])

    def get(self, id: str | int) -> Hit | None:
        """The item with this id, or None."""
        self._check_open()
        records = self._store.retrieve([_key(id)])
        return self._hit(records[0].payload, 1.0) if records else None

    def count(self, where: Mapping[str, Any] | None = None) -> int:
        """How many items there are, or how many pass a filter."""
        self._check_open()
        return self._store.count(parse(where))

    def delete(self, ids: str | int | Sequence[str | int]) -> int:
        """Remove items and their pictures (never a file that was only referenced). Returns how many there were."""
        with self._write_lock:
            self._check_open()
            records = self._store.retrieve([_key(id) for id in _listed(ids)])
            self._store.delete([record.id for record in records])
            self._release({r.payload[_SYSTEM]["sha256"]: r.payload[_SYSTEM]["uri"] for r in records})
        return len(records)

    def _hit(self, payload: dict[str, Any], score: float) -> Hit:
        columns = {name: value for name, value in payload.items() if name not in _RESERVED}
        system = payload[_SYSTEM]
        return Hit(payload["id"], score, payload.get("text"), columns, system["uri"], system["sha256"], self._images)

    # -------------------------------------------------------------------------------------------- generating

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        n: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Draw new pictures, and rank them by how well they agree with the prompt.

        Args:
            prompt: what to draw.
            negative_prompt: what to keep away from.
            n: how many pictures, at least 1.
            seed: makes them again; default: a random one, which the result tells.
            steps, guidance_scale, sampler: default: the bundle's own (`bundle.manifest["sampler"]`).
            callback: called with (UNet calls done, UNet calls in all); what it raises ends the generation.

        Returns:
            A Generation, best first; each picture with its score and its nearest catalogue item.

        Raises:
            OptionError, GenerationError: an argument is not a valid one.
        """
        started = time.perf_counter()
        self._check_open()
        if not isinstance(prompt, str) or not prompt.strip():
            raise OptionError(f"prompt={prompt!r}: it must be words that say what to draw")
        seed = secrets.randbelow(2**32) if seed is None else seed
        settings = self._generator.settings(steps=steps, guidance_scale=guidance_scale, sampler=sampler)

        # 1. Draw.
        images = self._generator.generate(
            prompt,
            negative_prompt=negative_prompt,
            n=n,
            seed=seed,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
            callback=callback,
        )

        # 2. Compare each picture with the prompt, and with what the catalogue holds.
        vectors = self._encoder.encode_images(images)
        scores = vectors @ self._encode_text(prompt)
        pictures = []
        for index, (image, vector, score) in enumerate(zip(images, vectors, scores, strict=True)):
            found = self._store.query(vector, limit=1)
            pictures.append(
                Generated(
                    image=image,
                    score=float(score),
                    nearest=self._hit(found[0].payload, found[0].score) if found else None,
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    seed=seed,
                    index=index,
                    steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    sampler=settings.sampler,
                    bundle=self.bundle.fingerprint,
                )
            )

        # 3. Rank.
        pictures.sort(key=lambda picture: -picture.score)
        return Generation(tuple(pictures), 1000 * (time.perf_counter() - started))

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
        """Location, number of items, and the bundle: name, path, fingerprint, dimensions. Opens no model."""
        reference = self._file.bundle
        return {
            "location": self.location,
            "items": self.count(),
            "created": self._file.created,
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
        return _key(self.id)


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
    _key(id)
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
    for key, times in Counter(_key(id) for id in ids if id is not None).items():
        if times > 1:
            raise OptionError(f"the id {next(id for id in ids if _key(id) == key)!r} is given {times} times")
    for source, text, payload, id in zip(sources, *columns.values(), ids, strict=True):
        picture, payload = _picture(source), {} if payload is None else payload
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


def _picture(source: Any) -> Picture:
    if isinstance(source, Hit):
        return Picture(source._images.path(source.uri))
    return Picture(source.image if isinstance(source, Generated) else source)


def _key(id: Any) -> str:
    """The UUID under which an id is stored; 7 and "7" are two different ids."""
    if isinstance(id, bool) or not isinstance(id, (str, int)) or id == "":
        raise OptionError(f"{id!r} is not an id: give a string that is not empty, or an integer")
    if isinstance(id, int) and not -(2**63) <= id < 2**63:
        raise OptionError(f"the id {id} does not fit into 64 bits: give it as a string")
    return str(uuid.uuid5(_ID_NAMESPACE, f"{type(id).__name__}:{id}"))


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
