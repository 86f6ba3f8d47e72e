"""The façade: a catalog of images that is searched and extended with one bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from PIL import Image

from unidiff_sdk._internal.images import ImageSource
from unidiff_sdk._internal.text import hide_key
from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.retrieval.columns import column_kinds, index_columns
from unidiff_sdk.retrieval.options import SearchOptions, call_with
from unidiff_sdk.retrieval.query import Query, batch_of, checked_ids, generates
from unidiff_sdk.retrieval.results import Hit, Page

from .aio import WRITING, async_variant, cancellable
from .results import AddReport, Generated, Generation
from .snapshot import OpenCatalog

if TYPE_CHECKING:
    from unidiff_sdk.generation.generator import Preview
    from unidiff_sdk.store.images.checking import CheckReport

    from .writer import Writer

__all__ = ["Catalog"]


class Catalog(OpenCatalog):
    """A collection of images with captions and columns, searched and extended with one bundle.

        with Catalog("shop.catalog", bundle="bundles/shop") as catalog:
            catalog.add_folder("products/")
            hits = catalog.search("red striped dress", where={"price": {"lt": 80}})
            images = catalog.generate("purple dotted boots", n=4, seed=7)

    Everything is stored in one folder, which may be moved. Threads may share a catalog; one process at a time may open
    a folder. Methods have async variants, which do not block the event loop: `async with Catalog.aopen("shop.catalog")
    as catalog: await catalog.asearch("boots")`.

    Args:
        location: a folder, created if it does not exist; ":memory:", deleted at `close`; or the http(s) URL of a Qdrant
            server or cluster.
        bundle: a folder written by `unidiff-export`, "hf:org/name" for one on the hub, or an open Bundle. Default: the
            bundle that the catalog was created with; for a new catalog "tiny", the built-in model.
        create: create a missing folder; if False, a missing folder is an error.
        quantization: "scalar" searches a new catalog in a folder with 8-bit vectors, in a quarter of the memory. Scores
            stay exact, because the original vectors on disk rank the hits.
        images: with a URL, required: the folder for the images. Or, with a URL or a folder, object storage for them: a
            URL that fsspec opens, such as "s3://bucket/prefix", or `ObjectStorage`. Needs the extra `s3` or `gcs`.
        collection, api_key, server: only with a URL: the name of the collection, the API key, and `ServerOptions`.
        references: the folder of the files that were added with `copy=False`. A catalog may come from a stranger, so
            its references are followed only into this folder and into folders added since it was opened.
        trusted_keys: PEM files with public keys, one of which must have signed each bundle that is opened from a path.
        rerank: compute what `search(rerank=)` needs of each image when it is added, as `prepare_rerank` does.

    Raises:
        StoreError: the location is not a catalog, is in use, or was created with another bundle.
        BundleError: the bundle is missing or damaged; with `rerank`, it has no generator.
    """

    @property
    def _writer(self) -> Writer:
        from .writer import Writer  # imported here, as all that a first search does not need

        return Writer(self._current, self._images)

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True  # also for an empty catalog

    # -------------------------------------------------------------------------------------------- adding

    def add(
        self,
        images: Any,
        texts: str | Sequence[str | None] | None = None,
        ids: str | int | Sequence[str | int | None] | None = None,
        payloads: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        copy: bool = True,
    ) -> list[str | int]:
        """Add images, or replace those with the same ids.

        All images are encoded before any is stored, so an invalid one stores nothing. They are then stored in order,
        256 at a time. If that fails, or the process ends, the batches before stay stored: add the same items again to
        store the rest. For more images than memory holds, call it several times, or use `add_folder`.

        Args:
            images: one image or a sequence: paths, bytes of image files, PIL images, arrays; hits, with their ids,
                captions and columns; or the images of `generate`, with the prompt as caption and the recipe as columns.
            texts: captions, one for each image; None for an image without one.
            ids: strings or integers, one for each image. Default, also for each None: a hash of image and caption.
            payloads: further columns, one dictionary for each image: JSON values under names other than id and text.
            copy: copy image files into the catalog; if False, reference them.

        Returns:
            The ids.

        Raises:
            OptionError: lengths differ, or an id, caption or payload is invalid.
            ImageError: an image cannot be read.
            StoreError: an embedding is not finite, or the disk is full. `stored_ids` has the ids of the items that are
                stored nevertheless.
        """
        from .items import items_of

        items = list(items_of(images, texts, ids, payloads))
        self._writer.add(items, copy=copy)
        return [item.id for item in items]

    def add_folder(
        self,
        path: str | Path,
        *,
        columns: Mapping[str, str | None] | None = None,
        kinds: Mapping[str, str] | None = None,
        prune: bool = False,
        strict: bool = False,
        progress: bool = False,
        copy: bool = True,
    ) -> AddReport:
        """Add a folder of images: with a metadata table, webdataset shards, a dataset of the hub, or images alone.

        Rows with an `id` column keep it; the others get a hash of image and caption. A row with the id of an earlier
        row is invalid. Unchanged items are skipped, so an interrupted run is continued by starting it again; an image
        is not encoded again if only its columns have changed. The search index of a large catalog is built at the end.

        Args:
            path: the folder, or a single `.tar` shard (`datasets.layouts` describes the formats).
            columns: names of columns, such as `{"image": "photo", "text": "title"}`. `{"text": None}`: no captions.
            kinds: kinds of csv columns: "string", "number" or "boolean". Default: detected.
            prune: also delete items that an earlier call added from this folder and that no valid row of it names now.
            strict: fail on the first invalid row instead of skipping it. The rows before it stay stored.
            progress: show a progress bar.
            copy: copy the images into the catalog; if False, reference them.

        Raises:
            DataError: the folder or its metadata file is missing; an invalid row with `strict`. With `prune`: no row is
                valid, which would delete everything, or a damaged shard hides the rows after it.
        """
        return self._writer.add_source(
            path, columns=columns, kinds=kinds, prune=prune, strict=strict, progress=progress, copy=copy
        )

    def add_table(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        columns: Mapping[str, str | None] | None = None,
        kinds: Mapping[str, str] | None = None,
        prune: bool = False,
        strict: bool = False,
        progress: bool = False,
        copy: bool = True,
    ) -> AddReport:
        """Add the rows of a `.jsonl`, `.csv` or `.parquet` file with any name, otherwise as `add_folder`.

        Args:
            path: the table. `file_name` is the image, `text` the caption, `id` the id; the rest are columns.
            images: the folder of the images, which `file_name` must not leave. Default: the folder of the table.
            columns, kinds, prune, strict, progress, copy: as for `add_folder`.

        Raises:
            DataError: as for `add_folder`; or the file is not a table.
        """
        return self._writer.add_table(
            path, images, columns=columns, kinds=kinds, prune=prune, strict=strict, progress=progress, copy=copy
        )

    def update(self, id: str | int | Hit, columns: Mapping[str, Any]) -> bool:
        """Change columns of an item, without encoding its image again. Other columns, caption and image stay.

        Args:
            id: of the item.
            columns: JSON values by name; None removes a column.

        Returns:
            Whether there is such an item.

        Raises:
            OptionError: a name is reserved (id, text) or not allowed, or a value is not JSON.
        """
        (checked,) = checked_ids(id)
        return self._writer.update(checked, columns)

    def delete(self, ids: str | int | Hit | Sequence[str | int | Hit]) -> int:
        """Delete items (ids or hits) and their images, but no referenced file. Returns the number of deleted items.

        Builds the search index again, in a separate process, each time more than a fifth of it was deleted. That takes
        seconds per 20,000 items.
        """
        return self._writer.delete(checked_ids(ids))

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
        rerank: bool | int = False,
        ef: int | None = None,
        exact: bool = False,
    ) -> Page:
        """Find the items most similar to a text, an image, items, a vector, or any mix of these.

            catalog.search("a summer dress", image=photo, unlike=["D-17"], without="stripes", where={"stock": True})

        A query of one part scores by cosine. Several parts are mixed into one vector, each scaled by how widely its
        scores spread over this catalog, so that a text counts next to an image (`retrieval.mixing` has the formula).

        Args:
            text: the text query.
            imagine: also search with this number of images generated from the text, up to 16. Improves long, detailed
                queries and takes the time of that many images (`retrieval.mixing`).
            image: a path, bytes, a PIL image, an array, a hit or a generated image.
            like, unlike: ids or hits to approach, and to avoid. They are excluded from the hits.
            without: texts to avoid.
            vector: an embedding of this catalog's bundle: `bundle.dim` numbers, of any norm.
            weights: of text and image as (0.4, 0.6), or by name as {"text": 2, "without": 0.3}. Only ratios matter.
                Default: 1 for wanted parts, 0.5 for unwanted parts and generated images.
            limit, offset: the maximum number of hits, 1 to 10,000, and the number of best hits to skip.
            cursor: instead of offset: `page.cursor` of the previous page. Items added or deleted between two pages then
                neither repeat nor hide a hit. All other arguments except limit must be the same.
            where: a filter on the columns (`store.filters`): `{"price": {"lt": 80}, "brand": ["a", "b"]}`.
            min_score: exclude hits with a lower score.
            diversity: 0 to 1, the weight of variety against similarity. Start with 0.3.
            group_by: a column; only the best item of each of its values is a hit. Items without it are kept.
            hybrid: also rank by the words of the captions (BM25) and fuse both rankings: True, or the share of the
                captions below 1. For names and numbers that an encoder does not know. Scores are then ranks.
            rerank: re-rank this number of best hits with the generator, 2 to 64; True: the number that the bundle
                recommends. Improves long, detailed queries (`retrieval.reranking`). Needs a text. The other parts of a
                mixed query count only for the encoder. Re-ranked hits have a `rerank_score`.
            ef: the number of candidates that the search index considers, 1 to 10,000. Fewer are faster, more find more
                of the nearest items. Default: the engine's, 100 on one machine.
            exact: compare with every item instead of searching the index. Finds all nearest items.

        Returns:
            A Page of hits, best first; an empty one if nothing matches.

        Raises:
            OptionError, FilterError, ImageError: an argument is invalid. `SearchOptions` has more on most.
            BundleError: `imagine` or `rerank` with a bundle that has no generator.
        """
        query = Query.of(text, imagine, image, like, unlike, without, vector, weights)
        options = SearchOptions(limit, offset, cursor, where, min_score, diversity, group_by, hybrid, rerank, ef, exact)
        return self._current.searcher().search([query], options)[0]

    def search_batch(self, /, queries: Sequence[str | Mapping[str, Any]], **options: Any) -> list[Page]:
        """Run several searches at once. Encoding them together is faster than searching one by one.

            catalog.search_batch(["red dress", {"text": "in blue", "image": photo}], limit=5)

        Args:
            queries: texts, or dictionaries with the query arguments of `search` (text, imagine, image, like, unlike,
                without, vector, weights).
            options: the other arguments of `search`, the same for all queries; except cursor.

        Returns:
            A page for each query; `took_ms` is the duration of the whole batch.
        """
        batch, searcher = batch_of(queries), self._current.searcher()
        if "cursor" in options:
            raise OptionError("cursor= belongs to one query: get its next page with search")
        shared = call_with(SearchOptions, options, "search_batch")
        return searcher.search(batch, shared) if batch else []

    def browse(
        self, *, where: Mapping[str, Any] | None = None, order_by: str | None = None, limit: int = 10, offset: int = 0
    ) -> Page:
        """List the items that match a filter in the order of a column, such as cheapest or newest first.

        Args:
            where: a filter on the columns.
            order_by: a column of numbers or dates; "-price" for descending order. Items without it are excluded.
                Default: a fixed order.
            limit, offset: the maximum number of items, and the number of items to skip.

        Raises:
            OptionError, FilterError: an argument is invalid.
        """
        return self._current.searcher().browse(where, order_by, limit, offset)

    def facets(
        self, column: str, *, where: Mapping[str, Any] | None = None, limit: int = 100
    ) -> dict[str | bool | int | float, int]:
        """Count the items with each value of a column, most frequent first: `{"Nord": 17, "Acme": 4}`.

        An item whose column holds a list counts once for each of its values. Only strings, booleans and numbers are
        counted. Numbers, dates and captions take about a second for 100,000 items.

        Args:
            column: the name of the column.
            where: a filter; only matching items are counted.
            limit: the maximum number of values.

        Raises:
            OptionError, FilterError: an argument is invalid.
        """
        return self._current.searcher().facets(column, where, limit)

    def duplicates(self, threshold: float = 0.95, *, where: Mapping[str, Any] | None = None) -> list[tuple[Hit, ...]]:
        """Find groups of two or more items with (almost) the same image, largest group first.

        Two items belong together if the cosine of their embeddings is at least `threshold`, or if other items link
        them. The score of a hit is its highest cosine to another item. Runs one search per item: minutes for 100,000.

        Args:
            threshold: above 0 and at most 1. A suitable value depends on the bundle; start high.
            where: a filter; only matching items are compared.

        Raises:
            OptionError, FilterError: an argument is invalid.
        """
        return self._current.searcher().duplicates(threshold, where)

    def get(self, id: str | int) -> Hit | None:
        """The item with this id, or None."""
        return self._current.searcher().get(id)

    def count(self, where: Mapping[str, Any] | None = None) -> int:
        """The number of items, or of items that match a filter."""
        return self._current.searcher().count(where)

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
        lora: str | Iterable[str] | Mapping[str, float | None] | None = None,
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
            prompt: the text to generate from; with a list, `n` images of each.
            negative_prompt: what guidance leads away from.
            n: the number of images for each prompt, at least 1.
            seed: the k-th candidate of a prompt uses the seed `seed + k`; that seed with n=1 generates it alone.
                Default: a random seed, which the result reports.
            steps, guidance_scale, sampler: default: those of the bundle (`bundle.sampler`).
            guidance_rescale: 0 to 1; removes the contrast that a high guidance_scale adds.
            width, height: in pixels; default: the size that the model was trained at.
            lora: LoRAs that the bundle can switch on (`bundle.loras`): a name, several names, or a weight for each,
                such as {"studio-light": 0.6}.
            long_prompts: "truncate" ignores what exceeds the model's tokens, with a warning; "chunk" encodes it too.
            like, strength, mask: start from an image; change it by this strength; repaint where the mask is bright.
            best_of: generate this number of candidates for each prompt and return the n with the highest scores.
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
            OptionError: an argument is out of range; `GenerationOptions` describes them all.
            ImageError: `like` or `mask` cannot be read.
            GenerationError: memory does not suffice, or the result is not finite.
            BusyError: too many generations are running.
        """
        from unidiff_sdk.generation.options import GenerationOptions

        from .generating import generate

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
            lora=lora,
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
        return generate(
            self._current.get(), prompt, options, self._current.make_hit, callback=callback, preview=preview
        )

    # -------------------------------------------------------------------------------------------- maintenance

    def optimize(self) -> None:
        """Build the search index in a separate process; other threads continue. `add_folder` calls it if necessary.

        Doubles the disk space of the vectors (not of the images) until the catalog is closed or optimized again.
        """
        self._current.get().optimize()

    def reindex(self, bundle: Bundle | str | Path, *, progress: bool = False) -> int:
        """Re-encode every image with another bundle, which becomes the bundle of the catalog.

        Searches use the old vectors, and items can be added and deleted, until all new vectors are written; then
        everything changes at once. An interrupted run continues where it stopped. On a server, the new vectors go into
        a new collection. Other processes search the old one, and must not write, until they open the catalog again.
        Returns the number of items; 0 if the catalog has this bundle already.

        Raises:
            ImageError: an image is missing or damaged. The catalog then keeps its old vectors.
            StoreError: the catalog is being reindexed already, or was built by `from_parts`.
            BusyError: the catalog had this bundle before, and a search or generation that began then is still running.
            OptionError: no bundle is given.
        """
        from .reindexing import reindex

        count = reindex(self._current, self._images, self._place, bundle, progress=progress)
        if self._current.prepares_rerank:
            self.prepare_rerank(progress=progress)
        return count

    def prepare_rerank(self, *, progress: bool = False) -> int:
        """Compute and store what `search(rerank=)` needs of each image, so that searches need not.

        These are the latents in half precision and the errors without a text. Images that have them are skipped, so an
        interrupted run continues where it stopped; damaged ones are replaced. Without it, searches compute them when
        needed and keep the last ones in memory. They are deleted with their image, and when the catalog is reindexed.
        Returns the number of images computed. A warning names items whose image cannot be read.

        Raises:
            BundleError: the bundle has no generator.
            StoreError: the disk is full.
        """
        from unidiff_sdk.retrieval.reranking.preparing import prepare_all

        current = self._current
        current.get().reranker(self._images)  # raises for a bundle that cannot
        return prepare_all(current.get().store, current.prepare_rerank, progress=progress)

    def check(self, *, repair: bool = False) -> CheckReport:
        """Compare the stored items with the image files, and report what is missing and what is left over.

        Reads all items and lists all files: about a minute for a million items. Other threads may continue.

        Args:
            repair: delete images that no item uses and what killed processes left, including the progress of an
                interrupted `reindex`, and build the search index if it is incomplete or holds deleted vectors.
                Only files with names that this library gives are deleted, and none that another process uses. On a
                server, whose images other processes may write, only files older than an hour are deleted.

        Returns:
            A CheckReport. `remaining` lists what was not fixed, and how to do it. Missing images cannot be restored.

        Raises:
            StoreError: the catalog is being reindexed, or the store failed.
        """
        from unidiff_sdk.store.images.checking import check

        current, is_local = self._current, self._place is not None and self._place.stores.url is None
        with current.while_not_reindexing() as snapshot:
            vectors = snapshot.file.vectors if is_local else None
            return check(snapshot.store, self._images, current.lock, vectors, repair=repair)

    def export(
        self,
        path: str | Path,
        *,
        where: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        progress: bool = False,
    ) -> int:
        """Write all items into one parquet file, with vectors and images (`archive`). Returns the number of items.

        Other threads may search and write in the meantime; the file may or may not include what they write. Needs the
        extra `parquet`.

        Args:
            path: the file.
            where: a filter; only matching items are written.
            overwrite: replace an earlier export with this name, once the new one is complete.
            progress: show a progress bar.

        Raises:
            DataError: pyarrow is missing, or the file exists: an earlier export without `overwrite`, or another file.
            ImageError: an image is missing, or a referenced one has changed. Nothing is written then.
            StoreError: the file cannot be written.
        """
        from .archive import write_archive

        return write_archive(path, self._current.get(), self._images, where, overwrite=overwrite, progress=progress)

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
        """Create a catalog from a file written by `export`, on any back end, and open it. Needs the extra `parquet`.

        Args:
            path: the file; or a folder that `scale.index(embeddings=)` wrote, or one of its files. Their images are
                read from the image store, so give the one of that catalog as `images`.
            location: as for `Catalog`; a new or empty folder, which is complete or absent afterwards, or a URL with a
                new or empty collection.
            bundle: the bundle of the export. Default: the path it had then.
            reencode: encode the images again with `bundle`, which may then be any bundle.
            progress: show a progress bar.
            opening: further arguments of `Catalog`: quantization, trusted_keys; for a URL images, collection, api_key,
                server.

        Raises:
            DataError: pyarrow is missing, or the file is not an export or is damaged.
            BundleError: the bundle has moved: give its new path.
            StoreError: the bundle is another one, or the location is not empty.
        """
        from .archive import restore_archive

        opening = hide_key(opening)
        return restore_archive(
            partial(cls, **opening), path, location, bundle, reencode, progress, opening.get("trusted_keys")
        )

    def columns(self) -> dict[str, str]:
        """The columns by name, each with its kinds in 1,024 random items, such as "number" or "number, string"."""
        return column_kinds(self._current.get().store)

    def create_indexes(self, columns: Sequence[str] | None = None) -> dict[str, str]:
        """Index columns ahead of the first search that filters, sorts, counts or ranks by them.

        Searches create the indexes that they need by themselves. Clients of a Qdrant server whose API key may only read
        cannot: their filters are slow without an index, and facets, sorting and hybrid searches fail.

        Args:
            columns: names as in a filter, such as "price" or "maker.city"; "text" for hybrid searches. Default: all.

        Returns:
            The kind of the index by column. Columns of objects, or of numbers and dates, have none.

        Raises:
            FilterError: a name is not that of a column.
            ForbiddenError: the API key may not create indexes.
        """
        return index_columns(self._current.get().store, columns)

    def info(self) -> dict[str, Any]:
        """Location, number of items, columns with their kinds in 1,024 random items (such as "number, string"), and the
        bundle: name, path, fingerprint, dimensions and purpose ("search and generation", or "search only"; None if the
        bundle was moved). Loads no model."""
        return {"location": self.location, **self._current.get().describe()}

    # -------------------------------------------------------------------------------------------- asyncio

    asearch = async_variant(search, generates=generates)
    asearch_batch = async_variant(search_batch, generates=generates)
    abrowse = async_variant(browse)
    afacets = async_variant(facets)
    aduplicates = async_variant(duplicates)
    aget = async_variant(get)
    acount = async_variant(count)
    aadd = async_variant(add, WRITING)
    aadd_folder = async_variant(add_folder, WRITING)
    aadd_table = async_variant(add_table, WRITING)
    aupdate = async_variant(update, WRITING)
    adelete = async_variant(delete, WRITING)
    acolumns = async_variant(columns)
    acreate_indexes = async_variant(create_indexes, WRITING)
    agenerate = cancellable(generate)
    aoptimize = async_variant(optimize, WRITING)
    areindex = async_variant(reindex, WRITING)
    aprepare_rerank = async_variant(prepare_rerank, WRITING)
    acheck = async_variant(check, WRITING)
    aexport = async_variant(export, WRITING)
