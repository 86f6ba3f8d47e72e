"""Bulk generation: images of a list of prompts, as a dataset that can be indexed or trained on."""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.json_values import number_within, whole_number
from unidiff_sdk._internal.parallel import batched
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk._internal.text import hide_key, json_text
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.catalog.catalog_file import MEMORY
from unidiff_sdk.catalog.writer import BulkAccess
from unidiff_sdk.datasets.reader import TABLES, InvalidRow, check_invalid_count
from unidiff_sdk.datasets.tables import read_lines, read_table
from unidiff_sdk.errors import DataError, OptionError, UniDiffError
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.retrieval.options import call_with
from unidiff_sdk.store.images.object_storage import ObjectFolder, image_place, user_cache

from .cluster import ray_data
from .indexing import absolute, absolute_images, is_url, plain
from .parts import pack, unpack
from .run_file import RunFile
from .stages import Batch, replaced

if TYPE_CHECKING:
    from unidiff_sdk.inference.bundle import Bundle

__all__ = ["BulkGeneration", "generate"]

CHUNK_PROMPTS = 8
METADATA = "metadata.jsonl"
_COMPARED_IMAGES = 1024  # at once, for duplicates
_EQUAL = 1 - 1e-6  # the cosine of equal vectors, which are rounded to float32
_OF_ONE_IMAGE = ("like", "mask", "strength", "safety", "seed")  # options that bulk jobs do not have


@dataclass(frozen=True)
class BulkGeneration:
    """The result of `generate`.

    Attributes:
        images: the number of images in the dataset.
        generated: the number of candidates generated, with rejected ones.
        duplicates: the number of images left out because they are too similar to an earlier one.
        failed: the invalid prompts, and those with fewer images than requested.
        seconds: the duration in seconds.
    """

    images: int
    generated: int
    duplicates: int
    failed: tuple[InvalidRow, ...]
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.images:,} images of {self.generated:,} candidates, {self.duplicates:,} duplicates left out, "
            f"{len(self.failed):,} prompts failed in {self.seconds:.1f} s"
        )


def generate(
    prompts: str | Path,
    to: str | Path,
    bundle: Bundle | str | Path | None = None,
    *,
    catalog: str | Path | None = None,
    seed: int = 0,
    duplicates: float | None = None,
    workers: int = 1,
    gpus: float = 0,
    record: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    opening: Mapping[str, Any] | None = None,
    **options: Any,
) -> BulkGeneration:
    """Generate images from each prompt of a file with several processes on Ray.

    The result is a dataset: `images/`, and `metadata.jsonl` with the prompt, the recipe, the score and the nearest item
    of each image. Row k uses the seeds from `seed + k · c` on, where c is the most candidates of one prompt. So
    another number of processes, or a resumed run, gives the same images.

    Args:
        prompts: a text file with a prompt on each line; or a table (.jsonl, .csv, .parquet) with the column `text`.
        to: a folder, or a URL in object storage, without a dataset.
        bundle: the bundle, under a path that all machines have. Default: that of the catalog, or the built-in one.
        catalog: the catalog that `max_similarity` compares with. One in a folder allows one worker.
        seed: of the first candidate of the first prompt.
        duplicates: leave out images whose cosine with one of an earlier row is at least this, 0 to 1.
        workers, gpus, record, resume, progress: as for `index`.
        opening: further arguments of `Catalog` for `catalog`: images, collection, api_key, server.
        options: of `Catalog.generate`, for each prompt: n, best_of, min_score, max_similarity, steps and others.

    Raises:
        ProviderError: Ray is not installed.
        OptionError: an argument is invalid.
        DataError: the prompts cannot be read, or there is a dataset at `to`.
        StoreError, BundleError: as for `Catalog` and `index`.
    """
    started = time.perf_counter()
    workers = whole_number("workers", workers, at_least=1)
    seed = whole_number("seed", seed, at_least=0)
    gpus = number_within("gpus", gpus, 0, 64, OptionError)
    if duplicates is not None:
        number_within("duplicates", duplicates, 0, 1, OptionError)
    if refused := [name for name in _OF_ONE_IMAGE if name in options]:
        raise OptionError(f"generate has no {', '.join(refused)}: bulk jobs generate each image from its prompt")
    checked: GenerationOptions = call_with(GenerationOptions, options, "generate")
    options = {name: getattr(checked, name) for name in options}
    output, job = ObjectFolder(image_place(to, "to")), _file_job(Path(prompts))
    chunks = list(batched(_prompts(Path(prompts)), CHUNK_PROMPTS))
    place, opening = MEMORY if catalog is None else catalog, hide_key(dict(opening or {}))
    if workers > 1 and catalog is not None and not is_url(str(place)):
        raise OptionError(f"{place} is a folder, which one process opens. Give workers=1, or a catalog on a server.")
    with Catalog(place, bundle, create=catalog is None, **opening) as opened:
        BulkAccess(opened).check_options(checked)
        path, fingerprint = absolute(opened.bundle.path), opened.bundle.fingerprint
    to, place, opening = absolute(to), absolute(place), absolute_images(opening)
    job |= {"to": to, "bundle": fingerprint, "catalog": [place, opening.get("collection")], "options": options}
    job |= {"seed": seed, "duplicates": duplicates}
    if not resume and output.has(METADATA):
        raise DataError(f"{to} has a dataset already ({METADATA}). Choose another place.")
    default = user_cache("bulk", f"{job['prompts']}\0{to}").with_suffix(".jsonl")
    file = RunFile(Path(record) if record is not None else default, job, resume=resume)
    stage = {
        "opening": {"location": place, "bundle": path, "create": catalog is None, **plain(opening)},
        "fingerprint": fingerprint,
        "to": to,
        "seed": seed,
        "stride": checked.max_candidates,
        "embed": duplicates is not None,
        "options": options,
        "device": "cuda" if gpus else "cpu",
    }
    try:
        _run(chunks, stage, file, workers, gpus, progress)
        return _finish(Path(prompts), file, output, duplicates, started)
    finally:
        file.close()


def _run(
    chunks: list[list[tuple[int, int, str, str]]],
    stage: dict[str, Any],
    file: RunFile,
    workers: int,
    gpus: float,
    progress: bool,
) -> None:
    """Generate the images of the chunks that are not done, and record them."""
    done = file.complete
    left = [{"number": number, "rows": pack(chunk)} for number, chunk in enumerate(chunks) if number not in done]
    if not left:
        return
    with ray_data(workers, workers * gpus) as data, progress_bar("Generating", progress) as advance:
        finished = data.from_items(left, override_num_blocks=len(left)).map_batches(
            _Generate,
            fn_constructor_kwargs=stage,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus or None,
        )
        for count, row in enumerate(finished.iter_rows(), start=1):
            result = unpack(row["rows"])
            if isinstance(result, UniDiffError):
                raise result
            file.add({"part": int(row["number"]), "chunk": 0, "last": True, **result})
            advance(CHUNK_PROMPTS * count, CHUNK_PROMPTS * len(left))


class _Generate:
    """Generates the images of chunks of prompts with one open catalog."""

    def __init__(
        self,
        opening: dict[str, Any],
        fingerprint: str,
        to: str,
        seed: int,
        stride: int,
        embed: bool,
        options: dict[str, Any],
        device: str,
    ) -> None:
        self._opening, self._fingerprint, self._to, self._device = opening, fingerprint, to, device
        self._seed, self._stride, self._embed, self._options = seed, stride, embed, options

    @cached_property
    def _catalog(self) -> Catalog:
        from unidiff_sdk.inference.bundle import Bundle

        threads = 1 if self._device == "cpu" else None
        path = self._opening["bundle"]
        bundle = Bundle.open(path, fingerprint=self._fingerprint, device=self._device, threads=threads)
        return Catalog(**{**self._opening, "bundle": bundle})

    @cached_property
    def _output(self) -> ObjectFolder:
        return ObjectFolder(image_place(self._to))

    def __call__(self, batch: Batch) -> Batch:
        return replaced(batch, self._chunk)

    def _chunk(self, rows: list[tuple[int, int, str, str]]) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        failed: list[tuple[int, str, str]] = []
        generated = 0
        for row, line, prompt, problem in rows:
            if problem:
                failed.append((line, prompt[:80], problem))
                continue
            seed = self._seed + row * self._stride
            try:
                generation = self._catalog.generate(prompt, seed=seed, **self._options)
            except OptionError as error:  # of this prompt
                failed.append((line, prompt[:80], str(error)))
                continue
            generated += generation.generated
            if len(generation) < (wanted := self._options.get("n", 1)):
                reasons = ", ".join(f"{count} by {name}" for name, count in generation.rejected.items() if count)
                failed.append((line, prompt[:80], f"{len(generation)} of {wanted} images; rejected: {reasons}"))
            images += [self._stored(row, rank, image) for rank, image in enumerate(generation)]
        return {"images": images, "failed": failed, "generated": generated}

    def _stored(self, row: int, rank: int, image: Any) -> dict[str, Any]:
        name = f"images/{row:09d}-{rank}.png"
        with tempfile.TemporaryDirectory(prefix="unidiff-") as folder:
            image.save(Path(folder) / "image.png")
            self._output.write(name, (Path(folder) / "image.png").read_bytes())
        nearest = {} if image.nearest is None else {"nearest": image.nearest.id, "similarity": image.nearest.score}
        columns = {"file_name": name, "text": image.prompt, **image.payload, "score": image.score, **nearest}
        if not self._embed:
            return {"row": row, "columns": columns}
        vector = BulkAccess(self._catalog).encode(image.image)
        return {"row": row, "columns": columns, "vector": base64.b64encode(vector.astype("<f2").tobytes()).decode()}


def _prompts(path: Path) -> Iterator[tuple[int, int, str, str]]:
    """Yield (row, line, prompt, what is wrong with it). Raises DataError if the file cannot be read."""
    if path.suffix.lower() in TABLES:
        for row, (line, columns) in enumerate(read_table(path, _check_header, {}, {"text"})):
            text = columns if isinstance(columns, str) else columns.get("text")
            is_valid = not isinstance(columns, str) and isinstance(text, str) and bool(text.strip())
            problem = columns if isinstance(columns, str) else "" if is_valid else "the column text is missing"
            yield row, line, str(text or "").strip() if is_valid else "", problem
        return
    for row, (line, text) in enumerate(read_lines(path)):
        problem = "the line is too long" if text is None else "" if text.strip() else "the line is empty"
        yield row, line, (text or "").strip(), problem


def _check_header(names: Any) -> None:
    if "text" not in names:
        raise DataError(f"the prompts have no column text. Columns: {', '.join(map(repr, names))}")


def _file_job(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Give a text file of prompts, or a table with a column text.")
    status = path.stat()
    return {"prompts": [str(path.resolve()), status.st_size, status.st_mtime]}


def _finish(
    prompts: Path, file: RunFile, output: ObjectFolder, duplicates: float | None, started: float
) -> BulkGeneration:
    """Leave out near-duplicates and write the metadata, in the order of the prompts."""
    entries = sorted(file.entries(), key=lambda entry: entry["part"])
    images = [image for entry in entries for image in entry["images"]]
    accepted = [True] * len(images) if duplicates is None else _accepted(images, duplicates)
    kept = [image["columns"] for image, accept in zip(images, accepted, strict=True) if accept]
    for image, accept in zip(images, accepted, strict=True):
        if not accept:
            output.delete(image["columns"]["file_name"])
    failed = [InvalidRow(*values) for entry in entries for values in entry["failed"]]
    check_invalid_count(prompts, len(failed))
    output.write(METADATA, "".join(json_text(columns) + "\n" for columns in kept).encode())
    generated = sum(entry["generated"] for entry in entries)
    return BulkGeneration(len(kept), generated, len(images) - len(kept), tuple(failed), time.perf_counter() - started)


def _accepted(images: Sequence[Mapping[str, Any]], threshold: float) -> list[bool]:
    """For each image, in the order of rows: whether no accepted one of an earlier row is as similar as `threshold`."""
    kept: list[_Embedded] = []
    accepted: list[bool] = []
    for batch in batched(images, _COMPARED_IMAGES):
        block = _Embedded.of(batch)
        accept = np.ones(len(batch), bool)
        for earlier in kept:
            accept &= ~block.repeats(earlier, threshold).any(axis=1)
        for number, same in enumerate(block.repeats(block, threshold)):
            accept[number] &= not (same & accept)[:number].any()
        kept.append(_Embedded(block.rows[accept], block.vectors[accept]))
        accepted += accept.tolist()
    return accepted


@dataclass(frozen=True)
class _Embedded:
    """Rows (n) and embeddings (n, dim) of images."""

    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]

    @classmethod
    def of(cls, images: Sequence[Mapping[str, Any]]) -> _Embedded:
        codes = b"".join(base64.b64decode(image["vector"]) for image in images)
        vectors = np.frombuffer(codes, "<f2").reshape(len(images), -1).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return cls(np.array([image["row"] for image in images]), vectors)

    def repeats(self, other: _Embedded, threshold: float) -> NDArray[np.bool_]:
        """Whether each image (n) is as similar as `threshold` to one (m) of an earlier row; (n, m)."""
        similar = self.vectors @ other.vectors.T >= min(threshold, _EQUAL)
        return similar & (other.rows < self.rows[:, None])
