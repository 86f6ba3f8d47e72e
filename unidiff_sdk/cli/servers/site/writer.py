"""Write a static site: the built page, the model, the items, and `site.json` with the hash of every file."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk._internal.files import checked_path, replacement_folder
from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk.catalog.snapshot import CatalogParts
from unidiff_sdk.errors import DataError, OptionError, ProviderError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.retrieval.mixing import NEUTRAL_TEXTS
from unidiff_sdk.retrieval.reranking.denoising_error import noise_of
from unidiff_sdk.retrieval.reranking.latents import LatentStore
from unidiff_sdk.retrieval.reranking.reranker import Reranker

from .items import Items, write_items, write_latents
from .model import check_bundle, describe_model, float32_json, schedule_of, write_model

__all__ = ["Site", "SiteOptions", "write_site"]

FORMAT, VERSION = "unidiff-site", 1
SITE = "site.json"
PAGE = Path(__file__).parent / "page"
"""The built page. Wheels hold it; in a checkout `make web` builds it."""

DATA, MODEL, RUNTIME = "data", "model", "ort"
SAMPLE, CAPTIONS = 512, 32  # as `retrieval.searcher` samples a catalog to mix queries
MIN_COSINE = 0.98  # int8 differs by less; another checkpoint by far more


@dataclass(frozen=True)
class SiteOptions:
    """What a site holds.

    Attributes:
        name: the title of the page.
        int8: store vectors in a quarter of the bytes, which changes scores by about 0.001.
        rerank: also write what re-ranking by the generator needs of each image.
        overwrite: replace an earlier site.
    """

    name: str
    int8: bool = False
    rerank: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Site:
    """A site that was written: its folder, the number of items, the size, and the bytes before the first search."""

    path: Path
    items: int
    bytes: int
    first_search_bytes: int


def write_site(
    parts: CatalogParts,
    out: Path,
    options: SiteOptions,
    bundle: Bundle | None = None,
    *,
    progress: bool = False,
) -> Site:
    """Write a catalog as a static site into the folder `out`, which is complete or unchanged.

    Args:
        parts: the items with their vectors, their images and their bundle: `Catalog.parts`.
        out: the folder of the site.
        options: what it holds.
        bundle: the model that the page runs: an export of the same checkpoint. Default: the bundle of the catalog.
        progress: show progress bars.

    Raises:
        DataError: `out` is something else than a site, or a site that may not be replaced; the catalog is empty.
        OptionError: the page cannot run the bundle, or it embeds differently from the bundle of the catalog.
        ProviderError: the page is not built.
        ImageError: an image cannot be read.
    """
    _check_page()
    out = checked_path(out, DataError)
    _check_replaceable(out, options.overwrite)
    bundle = bundle or parts.bundle
    check_bundle(bundle)
    items = Items.read(parts)
    if not items.records:
        raise DataError("the catalog is empty; add items first: unidiff index FOLDER CATALOG")
    encoder = Encoder(bundle)
    captions = items.captions[:CAPTIONS]
    _check_embeddings(parts, encoder, captions)
    with replacement_folder(out, DataError) as folder:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        data = folder / DATA
        data.mkdir()
        write_model(bundle, folder / MODEL)
        with progress_bar("Writing", progress) as advance:
            write_items(items, parts, data, int8=options.int8, advance=advance)
        model = describe_model(bundle)
        model["mixing"] = _mixing(encoder, captions, len(items.records))
        model["rerank"] = None
        if options.rerank:
            model["rerank"] = _write_rerank(items, parts, bundle, data, progress)
        _write_json(data / "model.json", model)
        return _write_index(folder, out, options, items)


# --- checks


def _check_page() -> None:
    if not (PAGE / "index.html").is_file():
        raise ProviderError(
            "The page is not built. In a checkout of the repository, run `make web`, which needs Node.js 18 or newer "
            "with npm. The packages on PyPI include it."
        )


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_site(out):
        raise DataError(f"{out} exists and is not a site. Name a new folder.")
    if not overwrite:
        raise DataError(f"{out} is an earlier site. Name another folder, or replace it: --overwrite")


def _is_site(folder: Path) -> bool:
    """Whether a folder was written by `write_site`: other programs have a `site.json`, too."""
    try:
        return bool(read_json(folder / SITE).get("format") == FORMAT)
    except DataError:
        return False


def _check_embeddings(parts: CatalogParts, encoder: Encoder, captions: list[str]) -> None:
    """Raise OptionError if the page's model and that of the catalog embed texts differently."""
    if encoder.bundle is parts.bundle:
        return
    if encoder.bundle.dim != parts.store.dim:
        raise OptionError(
            f"{encoder.bundle.path} has embeddings of {encoder.bundle.dim} dimensions, but the catalog holds "
            f"{parts.store.dim}. Name an export of the checkpoint that the catalog was indexed with."
        )
    texts = [*NEUTRAL_TEXTS, *captions]
    cosine = float((encoder.encode_texts(texts) * Encoder(parts.bundle).encode_texts(texts)).sum(axis=1).min())
    if cosine < MIN_COSINE:
        raise OptionError(
            f"{encoder.bundle.path} embeds texts differently from the bundle of the catalog: cosine {cosine:.3f}, "
            f"required ≥ {MIN_COSINE}. Name an export of the same checkpoint, or reindex the catalog with this bundle."
        )


# --- parts


def _mixing(encoder: Encoder, captions: list[str], items: int) -> dict[str, Any]:
    """What `retrieval.mixing` needs of the catalog: the mean of some captions and of neutral texts, and a sample."""
    texts = encoder.encode_texts([*NEUTRAL_TEXTS, *captions])
    neutral, captioned = texts[: len(NEUTRAL_TEXTS)], texts[len(NEUTRAL_TEXTS) :]
    return {
        "caption_mean": float32_json(captioned.sum(axis=0) / np.float32(max(len(captioned), 1))),
        "neutral_mean": float32_json(neutral.mean(axis=0)),
        "sample": min(SAMPLE, items),  # the first items; they are a random sample, because ids are hashed
    }


def _write_rerank(items: Items, parts: CatalogParts, bundle: Bundle, folder: Path, progress: bool) -> dict[str, Any]:
    """Write latents, errors and noise, and return what `retrieval.reranking` measures with them."""
    stored = LatentStore(parts.images.root, bundle.fingerprint)  # those of the catalog, if it is its bundle
    reranker = Reranker(bundle, lambda: Generator(bundle), parts.images.load, stored)
    schedule, latent, settings = schedule_of(bundle), bundle.latent, reranker.settings
    with progress_bar("Preparing", progress) as advance:
        write_latents(items, reranker.latents_of, settings.timesteps, folder, advance)
    shape = (latent.channels, latent.size, latent.size)
    noise = np.stack([noise_of(settings.noise_seed, timestep, shape) for timestep in settings.timesteps])
    (folder / "noise.bin").write_bytes(noise.astype("<f4").tobytes())
    bars = [float(schedule.alphas_cumprod[timestep]) for timestep in settings.timesteps]
    return {
        "timesteps": settings.timesteps,
        "candidates": settings.candidates,
        "weight": settings.weight,
        "velocity": schedule.prediction_type == "v_prediction",
        "signal": float32_json(np.array([math.sqrt(bar) for bar in bars], np.float32)),
        "noise": float32_json(np.array([math.sqrt(1 - bar) for bar in bars], np.float32)),
    }


# --- the index


def _write_index(folder: Path, out: Path, options: SiteOptions, items: Items) -> Site:
    """Write `site.json`: what the page loads, with the size and SHA-256 of every file."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    described = {name: _describe_file(path) for name, path in files.items()}
    is_data = {name: name.split("/")[0] in (DATA, MODEL, RUNTIME) for name in files}
    index = {
        "format": FORMAT,
        "version": VERSION,
        "name": options.name,
        "items": len(items.records),
        "dim": items.vectors.shape[1],
        "vectors": "int8" if options.int8 else "float32",
        "shell": [name for name in files if not is_data[name]],
        "files": {name: entry for name, entry in described.items() if is_data[name]},
    }
    _write_json(folder / SITE, index)
    sizes = {name: entry["bytes"] for name, entry in described.items()}
    searched = ("text_encoder", "clip_text_encoder", "tokenizer", "clip_tokenizer")
    first = sum(
        size
        for name, size in sizes.items()
        if not is_data[name]
        or name in (f"{DATA}/vectors.bin", f"{DATA}/scales.bin", f"{DATA}/items.json", f"{DATA}/model.json")
        or (name.startswith(f"{MODEL}/") and name.split("/")[1] in searched)
        or name.startswith(f"{RUNTIME}/wasm.")
    )
    return Site(out, len(items.records), sum(sizes.values()) + (folder / SITE).stat().st_size, first)


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
