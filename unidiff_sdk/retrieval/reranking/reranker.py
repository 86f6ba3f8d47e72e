"""Re-rank the encoder's best items with the generator.

**The formula.** Let s_i be the encoder's score of item i and e the denoising error (`denoising_error`). The share by
which the text lowers the error of the image is the item's gain,

    g_i = (e(x_i, ∅) - e(x_i, y)) / e(x_i, ∅)

where ∅ is the empty text. The K best items of the encoder are ordered by

    z(s_i) + w · z(g_i)        z(a_i) = (a_i - mean a) / (standard deviation of a), over these K items

and by id where that is equal. Dividing by e(x_i, ∅) is what makes items comparable: a plain image has small errors
under every text.

Measured with the built-in model on 180 whole captions and 180 short queries over 3 x 500 synthetic products with
combinations that training never showed ("test-unseen"), R@1 of both: the encoder alone 0.839 and 0.961; K = 4, w = 1.5
and t in {550, 750, 900} 0.928 and 0.972 (19 and 4 queries won, 3 and 2 lost); t in {750, 900} 0.922 and 0.972; t = 750
alone 0.850 and 0.956. With K = 8 at the first three timesteps 0.917 and 0.961; without the division by e(x, ∅) 0.900
and 0.944; by g alone 0.900 and 0.961. The setting was chosen on the split "val". `benchmarks/rerank.py` measures the
gain against the time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from unidiff_sdk._internal.parallel import batched
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import BundleError, GenerationError, ImageError, StoredImageError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import DEFAULT_RERANK, RerankDefaults
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule
from unidiff_sdk.retrieval.options import MAX_RERANKED
from unidiff_sdk.store import Record, ScoredRecord
from unidiff_sdk.store.payload import system_of

from .denoising_error import Denoiser, DenoisingError, Row
from .latents import ImageLatents, LatentCache, LatentStore

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Reranked", "Reranker", "combined_scores", "gains_of"]

Float64 = npt.NDArray[np.float64]

QUERIES_AT_ONCE = 16  # of a batch; bounds the memory for the latents of their candidates
MAX_TIMESTEPS = 16  # of a manifest, which may be a stranger's: each costs a call of the UNet for each candidate
TRAIN_TIMESTEPS = 1000  # that the timesteps of `DEFAULT_RERANK` refer to
_SMALLEST_SPREAD = 1e-6  # of scores or gains; below that the items are the same
_SMALLEST_ERROR = 1e-12


@dataclass(frozen=True)
class Reranked(ScoredRecord):
    """A search result that was re-ranked.

    Attributes:
        rerank_score: z(s) + w · z(g), which orders the items that were re-ranked.
        gain: g, the share by which the text lowers the denoising error of the image; at most 1.
    """

    rerank_score: float = 0.0
    gain: float = 0.0


class Reranker:
    """Re-ranks the items of one catalog with the generator of its bundle. May be shared between threads.

    Args:
        bundle: the model.
        denoiser: makes its generator, once the bundle is known to have one.
        load_image: returns the image with a URI.
        stored: latents that were computed before.

    Raises:
        BundleError: the bundle has no generator, or its defaults do not fit its noise schedule.
    """

    def __init__(
        self,
        bundle: Bundle,
        denoiser: Callable[[], Denoiser],
        load_image: Callable[[str], Image.Image],
        stored: LatentStore,
    ) -> None:
        check_generator(bundle)
        schedule = bundle.schedule()
        self.settings = settings_of(bundle, schedule)
        self.stored = stored
        self._bundle, self._denoiser, self._load_image = bundle, denoiser(), load_image
        self._error = DenoisingError(self._denoiser, schedule, self.settings.noise_seed)
        self._cache = LatentCache()
        latent = bundle.latent
        self._shape = (latent.channels, latent.size, latent.size)

    def rerank(self, queries: Sequence[tuple[str, Sequence[ScoredRecord]]]) -> list[list[Reranked]]:
        """The candidates of each text in their new order.

        Raises:
            StoredImageError: the image of a candidate cannot be read.
            GenerationError: the model returned values that are not finite.
            BusyError: too many generations are running.
        """
        self._warn_if_unproven()
        return [
            _ordered(candidates, np.array([gains[text, _sha256(item)] for item in candidates]), self.settings.weight)
            for some in batched(queries, QUERIES_AT_ONCE)
            for gains in [self._gains(some)]
            for text, candidates in some
        ]

    def prepare(self, records: Sequence[Record]) -> dict[str, ImageLatents]:
        """The latents of those records that have none in `stored`, or damaged ones, by the hash of the image.

        Raises:
            StoredImageError, GenerationError: as for `rerank`.
        """
        stored = {_sha256(record): self._read(record) for record in records}
        missing = {_sha256(record): record for record in records if not self._is_complete(stored[_sha256(record)])}
        return self._computed(missing, stored)

    def latents_of(self, items: Iterable[Record | ScoredRecord]) -> dict[str, ImageLatents]:
        """The latents of items by the hash of the image: cached, stored, or computed now.

        Raises:
            StoredImageError, GenerationError: as for `rerank`.
        """
        wanted = {_sha256(item): item for item in items}
        known = {sha256: self._cache.get(sha256) or self._read(item, damage=warn) for sha256, item in wanted.items()}
        incomplete = {sha256: item for sha256, item in wanted.items() if not self._is_complete(known[sha256])}
        computed = self._computed(incomplete, known)
        found = {sha256: latents for sha256, latents in (known | computed).items() if latents is not None}
        for sha256, latents in found.items():
            self._cache.put(sha256, latents)
        return found

    # Stages

    def _gains(self, queries: Sequence[tuple[str, Sequence[ScoredRecord]]]) -> dict[tuple[str, str], float]:
        """The gain of each pair of a text and the hash of an image. All pairs go through the UNet together."""
        items = {_sha256(item): item for _, candidates in queries for item in candidates}
        latents = self.latents_of(items.values())
        pairs = list(dict.fromkeys((text, _sha256(item)) for text, candidates in queries for item in candidates))
        conditions = {text: self._denoiser.conditions(text) for text, _ in queries}
        rows = [
            Row(latents[sha256].latents, timestep, conditions[text])
            for text, sha256 in pairs
            for timestep in self.settings.timesteps
        ]
        errors = self._error.measure(rows).reshape(len(pairs), len(self.settings.timesteps))
        unconditional = np.array(
            [[latents[sha256].errors[timestep] for timestep in self.settings.timesteps] for _, sha256 in pairs]
        ).reshape(errors.shape)
        gains = gains_of(unconditional, errors)
        for (_, sha256), gain in zip(pairs, gains, strict=True):
            if not np.isfinite(gain):
                raise self._not_finite(self._bundle.manifest.denoiser.graph, items[sha256])
        return dict(zip(pairs, map(float, gains), strict=True))

    def _read(self, item: Record | ScoredRecord, damage: Callable[[str], None] | None = None) -> ImageLatents | None:
        """The stored latents of an item; None if they are missing, damaged, or of another shape or noise seed."""
        try:
            latents = self.stored.read(_sha256(item))
        except ValueError as error:
            if damage is not None:
                damage(
                    f"the stored latents of {item.payload['id']!r} are damaged ({error}) and were computed again; "
                    "call prepare_rerank() to replace them"
                )
            return None
        is_ours = latents and latents.latents.shape == self._shape and latents.noise_seed == self.settings.noise_seed
        return latents if is_ours else None

    def _is_complete(self, latents: ImageLatents | None) -> bool:
        return latents is not None and latents.errors.keys() >= set(self.settings.timesteps)

    def _computed(
        self, items: Mapping[str, Record | ScoredRecord], known: Mapping[str, ImageLatents | None]
    ) -> dict[str, ImageLatents]:
        """The latents of images and their errors without a text. Latents that are known already lack only errors."""
        if not items:
            return {}
        latents: dict[str, npt.NDArray[np.float16]] = {}
        for sha256, item in items.items():
            before = known[sha256]
            latents[sha256] = self._encode(item) if before is None else before.latents
        empty, timesteps = self._denoiser.conditions(""), self.settings.timesteps
        rows = [Row(each, timestep, empty) for each in latents.values() for timestep in timesteps]
        errors = self._error.measure(rows).reshape(len(latents), len(timesteps))
        for item, measured in zip(items.values(), errors, strict=True):
            if not np.isfinite(measured).all():
                raise self._not_finite(self._bundle.manifest.denoiser.graph, item)
        return {
            sha256: ImageLatents(
                each, dict(zip(timesteps, map(float, measured), strict=True)), self.settings.noise_seed
            )
            for (sha256, each), measured in zip(latents.items(), errors, strict=True)
        }

    def _encode(self, item: Record | ScoredRecord) -> npt.NDArray[np.float16]:
        try:
            image = self._load_image(system_of(item.payload)["uri"])
        except ImageError as error:
            raise StoredImageError(
                f"rerank= needs the image of {item.payload['id']!r}: {error} Restore the file, delete the item, or "
                "search without rerank="
            ) from error
        latents = self._denoiser.latents(image)
        with np.errstate(over="ignore"):  # becomes infinite, which is an error below
            half = latents.astype(np.float16)
        if not np.isfinite(half).all():
            raise self._not_finite("vae_encoder", item)
        return half

    def _not_finite(self, graph: str, item: Record | ScoredRecord) -> GenerationError:
        return GenerationError(
            f"the {graph} of the {self._bundle.precision} bundle {self._bundle.path} returns values that are not "
            f"finite for the image of {item.payload['id']!r}; search without rerank=, or export the bundle at a higher "
            "precision"
        )

    def _warn_if_unproven(self) -> None:
        gain = self.settings.gain
        if gain is None:
            warn(
                f'rerank= uses general defaults with the bundle "{self._bundle.name}", and whether it gains with this '
                "model was not measured. Measure it: unidiff-export rerank BUNDLE DATA"
            )
        elif gain.reranked_recall_at_1 <= gain.recall_at_1:
            warn(
                f'rerank= does not gain with the bundle "{self._bundle.name}": recall at 1 was '
                f"{gain.recall_at_1:.3f} without it and {gain.reranked_recall_at_1:.3f} with it, over {gain.queries} "
                "captions"
            )


def check_generator(bundle: Bundle) -> None:
    """Raise BundleError if a bundle lacks the graphs that re-ranking needs."""
    needed = (bundle.manifest.denoiser.graph, "vae_encoder")
    if missing := [graph for graph in needed if not bundle.has_graph(graph)]:
        raise BundleError(
            f"rerank= needs a generator, but {bundle.path} has no {' and no '.join(missing)}; search without rerank=, "
            "or export CLIP and Stable Diffusion together"
        )


def settings_of(bundle: Bundle, schedule: Schedule | FlowSchedule) -> RerankDefaults:
    """The bundle's own defaults, or the general ones at its number of timesteps. Raises BundleError."""
    own, total = bundle.manifest.rerank, schedule.num_train_timesteps
    if own is None:
        timesteps = tuple(timestep * total // TRAIN_TIMESTEPS for timestep in DEFAULT_RERANK.timesteps)
        return RerankDefaults(timesteps, DEFAULT_RERANK.candidates, DEFAULT_RERANK.weight)
    if max(own.timesteps) >= total:
        raise BundleError(
            f"{bundle.path}: rerank.timesteps are {list(own.timesteps)}, but the model has timesteps 0 to {total - 1}; "
            "export it again"
        )
    if not 2 <= own.candidates <= MAX_RERANKED or len(own.timesteps) > MAX_TIMESTEPS:
        raise BundleError(
            f"{bundle.path}: rerank.candidates is {own.candidates} and rerank.timesteps has {len(own.timesteps)} "
            f"entries; they must be 2 to {MAX_RERANKED}, and at most {MAX_TIMESTEPS}. Run: "
            "unidiff-export rerank BUNDLE DATA"
        )
    return own


def gains_of(unconditional: Float64, errors: Float64) -> Float64:
    """The gains g, from errors without a text and with one: float64[…, items, timesteps] to float64[…, items]."""
    without, with_text = unconditional.mean(axis=-1), errors.mean(axis=-1)
    return cast(Float64, (without - with_text) / np.maximum(without, _SMALLEST_ERROR))


def combined_scores(scores: npt.ArrayLike, gains: npt.ArrayLike, weight: float) -> Float64:
    """z(s) + w · z(g): float64[…, items]."""
    return _standardized(scores) + weight * _standardized(gains)


def _ordered(candidates: Sequence[ScoredRecord], gains: Float64, weight: float) -> list[Reranked]:
    combined = combined_scores([item.score for item in candidates], gains, weight)
    reranked = [
        Reranked(item.id, item.score, item.payload, item.vector, float(score), float(gain))
        for item, score, gain in zip(candidates, combined, gains, strict=True)
    ]
    return sorted(reranked, key=lambda item: (-item.rerank_score, item.id))


def _standardized(values: npt.ArrayLike) -> Float64:
    array = np.asarray(values, np.float64)
    if not array.size:
        return array
    spread, centered = array.std(axis=-1, keepdims=True), array - array.mean(axis=-1, keepdims=True)
    differs = spread > _SMALLEST_SPREAD
    return np.where(differs, centered, 0) / np.where(differs, spread, 1)


def _sha256(item: Record | ScoredRecord) -> str:
    return str(system_of(item.payload)["sha256"])
