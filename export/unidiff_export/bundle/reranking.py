"""Choose the defaults of `search(rerank=)` for a bundle, and measure what they gain on other captions.

The runtime's own encoder, UNet and noise measure everything once: the encoder's best items for each caption, and their
denoising errors at each timestep of a grid. Every combination of timesteps, number of candidates and weight is then a
matter of sums. The gain in the manifest is cross-validated: no caption counts for a combination that it helped choose.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.files import write_atomically
from unidiff_sdk._internal.images import load_image
from unidiff_sdk.datasets.reader import read_catalog
from unidiff_sdk.errors import DataError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import MANIFEST, Manifest, RerankDefaults, RerankGain
from unidiff_sdk.retrieval.reranking.denoising_error import DenoisingError, Row
from unidiff_sdk.retrieval.reranking.reranker import check_generator, combined_scores, gains_of
from unidiff_sdk.training.data.captions import normalize_caption

__all__ = ["Measured", "affordable_queries", "choose", "measure", "rerank_defaults", "write_rerank"]

Setting = tuple[int, tuple[int, ...], float]
"""The number of candidates, the timesteps, and the weight."""

TIMESTEPS = (550, 650, 750, 850, 900)  # of 1,000: high noise, where the text decides what the UNet sees
CANDIDATES = (4, 8)
WEIGHTS = (0.5, 1.0, 1.5, 2.0, 3.0)
# With one timestep, a single draw of noise decides. Each costs as many evaluations of the UNet as there are candidates.
MIN_TIMESTEPS, MAX_TIMESTEPS = 2, 4
NOISE_SEED = 0
# Recall at 1 that one more evaluation of the UNet for each search must earn.
EVALUATION_COST = 0.001
MAX_QUERIES, MIN_QUERIES, MAX_GALLERY = 200, 60, 1000
# Time for the measurement in an export. A model that is too slow for `MIN_QUERIES` keeps the general defaults.
EXPORT_SECONDS = 300.0


@dataclass(frozen=True)
class Measured:
    """The encoder's best items for each query, and their denoising errors.

    Attributes:
        scores: of the encoder, descending: float[queries, candidates].
        unconditional, errors: without and with the query's text: float64[queries, candidates, timesteps].
        relevant: bool[queries, candidates].
        timesteps: of the errors.
        gallery: number of items.
    """

    scores: NDArray[Any]
    unconditional: NDArray[np.float64]
    errors: NDArray[np.float64]
    relevant: NDArray[np.bool_]
    timesteps: tuple[int, ...]
    gallery: int

    def first_hits(self, candidates: int, timesteps: Sequence[int], weight: float) -> NDArray[np.bool_]:
        """Whether the first hit of each query is relevant after re-ranking: bool[queries]."""
        columns = [self.timesteps.index(timestep) for timestep in timesteps]
        gains = gains_of(self.unconditional[:, :candidates, columns], self.errors[:, :candidates, columns])
        best = combined_scores(self.scores[:, :candidates], gains, weight).argmax(axis=1)
        return self.relevant[np.arange(len(best)), best]


def measure(
    bundle: Bundle,
    images: Sequence[Image.Image],
    queries: Sequence[tuple[str, Collection[int]]],
    timesteps: Sequence[int],
    candidates: int = max(CANDIDATES),
) -> Measured:
    """Search a gallery and measure the errors of the best items.

    Args:
        bundle: with a generator.
        images: the gallery.
        queries: texts, each with the indices of the relevant images.
        timesteps: training timesteps.
        candidates: the number of best items for each query.
    """
    check_generator(bundle)
    encoder, generator = Encoder(bundle), Generator(bundle)
    error = DenoisingError(generator, bundle.schedule(), NOISE_SEED)
    vectors = encoder.encode_images(images)
    scores = encoder.encode_texts([text for text, _ in queries]) @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :candidates]

    latents = {int(item): generator.latents(images[item]).astype(np.float16) for item in np.unique(order)}
    empty = generator.conditions("")
    rows = [Row(each, timestep, empty) for each in latents.values() for timestep in timesteps]
    measured = error.measure(rows).reshape(len(latents), len(timesteps))
    unconditional = dict(zip(latents, measured, strict=True))
    errors = [
        error.measure([Row(latents[int(i)], t, conditions) for i in items for t in timesteps])
        for (text, _), items in zip(queries, order, strict=True)
        for conditions in [generator.conditions(text)]
    ]
    return Measured(
        scores=np.take_along_axis(scores, order, axis=1),
        unconditional=np.array([[unconditional[int(item)] for item in items] for items in order]),
        errors=np.array(errors).reshape(*order.shape, len(timesteps)),
        relevant=np.array(
            [[item in wanted for item in items] for (_, wanted), items in zip(queries, order, strict=True)]
        ),
        timesteps=tuple(timesteps),
        gallery=len(images),
    )


def choose(measured: Sequence[Measured]) -> RerankDefaults:
    """The defaults with the best recall at 1 for their cost.

    Their gain is cross-validated: what is best on every other query is counted on the rest, and the other way round.
    """
    all_queries, halves = slice(None), (slice(0, None, 2), slice(1, None, 2))

    def hits(setting: Setting, queries: slice) -> NDArray[np.bool_]:
        return np.concatenate([each.first_hits(*setting)[queries] for each in measured])

    def best(queries: slice) -> Setting:
        def value(setting: Setting) -> float:
            candidates, timesteps, _ = setting
            return float(hits(setting, queries).mean()) - EVALUATION_COST * candidates * len(timesteps)

        return max(settings, key=value)

    sizes = range(MIN_TIMESTEPS, MAX_TIMESTEPS + 1)
    subsets = [subset for size in sizes for subset in combinations(measured[0].timesteps, size)]
    settings: list[Setting] = list(product(CANDIDATES, subsets, WEIGHTS))
    unseen = np.concatenate([hits(best(chosen_on), rest) for chosen_on, rest in (halves, halves[::-1])])
    gain = RerankGain(
        recall_at_1=round(float(np.concatenate([each.relevant[:, 0] for each in measured]).mean()), 4),
        reranked_recall_at_1=round(float(unseen.mean()), 4),
        queries=len(unseen),
        gallery=measured[0].gallery,
    )
    candidates, timesteps, weight = best(all_queries)
    return RerankDefaults(timesteps, candidates, weight, NOISE_SEED, gain)


def rerank_defaults(bundle: Bundle, data: Sequence[str | Path], limit: int = MAX_QUERIES) -> RerankDefaults:
    """Choose and measure the defaults of a bundle on catalogs on disk.

    Args:
        bundle: with a generator.
        data: catalogs with captions, each searched by itself. Images with an equal caption are equally relevant.
        limit: the most captions of each catalog to search with.

    Raises:
        BundleError: the bundle has no generator.
        DataError: the data have fewer than `MIN_QUERIES` captions.
    """
    check_generator(bundle)
    galleries = [_gallery(path, limit) for path in data]
    captions = sum(len(queries) for _, queries in galleries)
    if captions < MIN_QUERIES:
        raise DataError(f"{', '.join(map(str, data))}: {captions} captions; give at least {MIN_QUERIES} to measure on")
    total = bundle.schedule().num_train_timesteps
    timesteps = [timestep * total // 1000 for timestep in TIMESTEPS]
    return choose([measure(bundle, images, queries, timesteps) for images, queries in galleries])


def affordable_queries(bundle: Bundle, seconds: float = EXPORT_SECONDS) -> int:
    """The number of captions that can be measured in a time, from the time of one call of the UNet."""
    generator, latent = Generator(bundle), bundle.latent
    error = DenoisingError(generator, bundle.schedule(), NOISE_SEED)
    rows = [Row(np.zeros((latent.channels, latent.size, latent.size), np.float16), 1, generator.conditions(""))] * 4
    error.measure(rows)  # loads the graph
    started = time.perf_counter()
    error.measure(rows)
    each = (time.perf_counter() - started) / len(rows)
    # With a text for each candidate, and without one for about as many images as there are captions.
    return int(seconds / (each * len(TIMESTEPS) * (max(CANDIDATES) + 1)))


def write_rerank(folder: Path, defaults: RerankDefaults) -> None:
    """Write the defaults into the manifest of a bundle. A signature does not fit any more."""
    manifest = replace(Manifest.read(folder), rerank=defaults)
    write_atomically(folder / MANIFEST, (json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n").encode())


def _gallery(path: str | Path, limit: int) -> tuple[list[Image.Image], list[tuple[str, set[int]]]]:
    rows = list(islice(read_catalog(path), MAX_GALLERY))
    meanings: dict[str, set[int]] = {}
    for i, row in enumerate(rows):
        meanings.setdefault(normalize_caption(row.text), set()).add(i)
    queries = [(rows[min(items)].text, items) for items in islice(meanings.values(), limit)]
    return [load_image(row.image()) for row in rows], queries
