"""The results of a catalog: generated images, and reports of what was added."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk.retrieval.results import Hit, figure, gallery

if TYPE_CHECKING:
    from PIL import Image

    from unidiff_sdk.datasets.reader import InvalidRow

__all__ = ["AddReport", "Generated", "Generation"]


@dataclass(frozen=True)
class Generated:
    """One generated image, and everything needed to reproduce it.

    Attributes:
        image: the image, RGB.
        score: the cosine of its embedding with that of the prompt.
        nearest: the most similar catalog item, scored by that cosine; None if the catalog is empty.
        seed: the seed of this image; generating with n=1 and this seed reproduces it.
        bundle: the fingerprint of the bundle.
        lora: the weights of the LoRAs that were switched on, by name.
        like, mask: SHA-256 of the images it was generated from, as in `Hit.sha256`.
        strength: how much `like` was changed, 0 to 1.
        replaced: whether a safety hook replaced the generated image with this one.
    """

    image: Image.Image = field(repr=False)
    score: float
    nearest: Hit | None = field(repr=False)
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: str
    long_prompts: str
    bundle: str = field(repr=False)
    lora: Mapping[str, float] = field(default_factory=dict)
    like: str | None = field(default=None, repr=False)
    strength: float | None = None
    mask: str | None = field(default=None, repr=False)
    replaced: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of `Catalog.generate` that reproduce the image, and the hashes of its bundle and sources."""
        recipe = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "sampler": self.sampler,
            "width": self.image.width,
            "height": self.image.height,
            "long_prompts": self.long_prompts,
            "bundle": self.bundle,
        }
        edited = {
            "lora": dict(self.lora),
            "like": self.like,
            "strength": self.strength,
            "mask": self.mask,
            "replaced": self.replaced,
        }
        return recipe | {name: value for name, value in edited.items() if value}

    @property
    def payload(self) -> dict[str, Any]:
        """The columns that `Catalog.add` stores with a generated image; its caption is the prompt.

        A search with `where={"not": {"generated": True}}` excludes generated images.
        """
        loras = [f"{name}:{weight:g}" for name, weight in self.lora.items()]
        return {"generated": True, **self.recipe, **({"lora": loras} if loras else {})}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the image as lossless .png or .webp, with its recipe in the metadata (`provenance.read_recipe`).

        Raises:
            OptionError: the name has another suffix.
            StoreError: the file cannot be written.
        """
        from unidiff_sdk.generation.provenance import save

        save(self.image, self.recipe, path)

    def _repr_html_(self) -> str:
        return gallery([_generated_figure(self)])


@dataclass(frozen=True)
class Generation(Sequence[Generated]):
    """The images of one call, in the order of the prompts, those of each prompt by descending score; a sequence.

    Attributes:
        images: the requested number of images, or fewer if too many candidates were rejected.
        took_ms: the duration of the call in milliseconds.
        generated: the number of candidates generated.
        rejected: the number of candidates rejected by `min_score`, `max_similarity` and `safety`, by that name.
    """

    images: tuple[Generated, ...]
    took_ms: float
    generated: int
    rejected: Mapping[str, int]

    @overload
    def __getitem__(self, index: int) -> Generated: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Generated, ...]: ...
    def __getitem__(self, index: int | slice) -> Generated | tuple[Generated, ...]:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Generated]:
        return iter(self.images)

    def _repr_html_(self) -> str:
        return gallery([_generated_figure(generated) for generated in self])


@dataclass(frozen=True)
class AddReport:
    """The result of `Catalog.add_folder` or `add_table`.

    Attributes:
        added: the number of items that are new or have changed.
        skipped: the number of items stored already, without a change.
        failed: the invalid rows, each with its line and the reason.
        seconds: the duration in seconds.
        removed: the number of items deleted because they are no longer in the source (`prune`).
    """

    added: int
    skipped: int
    failed: tuple[InvalidRow, ...]
    seconds: float
    removed: int = 0

    def __str__(self) -> str:
        removed = f", {self.removed:,} removed" if self.removed else ""
        rate = f" ({self.added / self.seconds:,.0f} per second)" if self.added and self.seconds else ""
        counts = f"{self.added:,} added, {self.skipped:,} unchanged, {len(self.failed):,} failed{removed}"
        return f"{counts} in {self.seconds:.1f} s{rate}"


# ------------------------------------------------------------------------------------------------ notebooks


def _generated_figure(generated: Generated) -> str:
    buffer = io.BytesIO()
    generated.image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<b>{generated.score:.3f}</b> {html.escape(terminal_safe(generated.prompt))}<br>seed {generated.seed}"
    return figure(f"data:image/png;base64,{data}", caption)
