"""What a catalog answers with: hits in pages, generated pictures, and reports of what was added."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

from unidiff_sdk.retrieval.results import Hit, figure, gallery

if TYPE_CHECKING:
    from PIL import Image

    from unidiff_sdk.datasets.reader import InvalidRow

__all__ = ["AddReport", "Generated", "Generation"]


@dataclass(frozen=True)
class Generated:
    """One generated picture and all that makes it again.

    Attributes:
        image: the picture, RGB.
        score: cosine between its embedding and the prompt's.
        nearest: the catalog item that looks most like it, with that cosine as its score; None if the catalog is
            empty.
        seed: of this picture alone: generating with n=1 and this seed draws it again.
        bundle: fingerprint of the bundle that drew it.
        like, mask: SHA-256 of the pictures that it was made from, as `Hit.sha256` is; strength: how far from the first.
        replaced: whether a safety hook put this picture in the place of the one that was drawn.
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
    like: str | None = field(default=None, repr=False)
    strength: float | None = None
    mask: str | None = field(default=None, repr=False)
    replaced: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """What makes the picture again: arguments of `Catalog.generate`, and what tells bundle and pictures apart."""
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
        edited = {"like": self.like, "strength": self.strength, "mask": self.mask, "replaced": self.replaced}
        return recipe | {name: value for name, value in edited.items() if value}

    @property
    def payload(self) -> dict[str, Any]:
        """The columns that `Catalog.add` gives a generated picture, beside the prompt as its caption.

        `{"not": {"generated": True}}` as the `where` of a search leaves out all that have them.
        """
        return {"generated": True, **self.recipe}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the picture as .png or .webp, without loss, with its recipe inside (`provenance.read_recipe`).

        Raises:
            OptionError: the name ends otherwise.
            StoreError: the file cannot be written.
        """
        from unidiff_sdk.generation.provenance import save

        save(self.image, self.recipe, path)

    def _repr_html_(self) -> str:
        return gallery([_generated_figure(self)])


@dataclass(frozen=True)
class Generation(Sequence[Generated]):
    """The pictures of one call, prompt after prompt, of each the one that agrees best with it first; a sequence.

    Attributes:
        pictures: as many as were asked for; fewer if too many were refused.
        took_ms: time of the whole call, in milliseconds.
        drawn: how many were drawn.
        refused: of those, how many `min_score`, `max_similarity` and `safety` refused, by that name.
    """

    pictures: tuple[Generated, ...]
    took_ms: float
    drawn: int
    refused: Mapping[str, int]

    @overload
    def __getitem__(self, index: int) -> Generated: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Generated, ...]: ...
    def __getitem__(self, index: int | slice) -> Generated | tuple[Generated, ...]:
        return self.pictures[index]

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Generated]:
        return iter(self.pictures)

    def _repr_html_(self) -> str:
        return gallery([_generated_figure(picture) for picture in self])


@dataclass(frozen=True)
class AddReport:
    """What `Catalog.add_folder` did.

    Attributes:
        added: items that are new or have changed.
        skipped: items that were there already, unchanged.
        failed: rows that could not be used, each with its line and the reason.
        seconds: how long it took.
        removed: items that came from there earlier and were deleted, as they no longer do (`prune`).
    """

    added: int
    skipped: int
    failed: tuple[InvalidRow, ...]
    seconds: float
    removed: int = 0

    def __str__(self) -> str:
        removed = f", {self.removed:,} removed" if self.removed else ""
        rate = f" ({self.added / self.seconds:,.0f} a second)" if self.added and self.seconds else ""
        counts = f"{self.added:,} added, {self.skipped:,} unchanged, {len(self.failed):,} failed{removed}"
        return f"{counts} in {self.seconds:.1f} s{rate}"


# ------------------------------------------------------------------------------------------------ notebooks


def _generated_figure(picture: Generated) -> str:
    buffer = io.BytesIO()
    picture.image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<b>{picture.score:.3f}</b> {html.escape(picture.prompt)}<br>seed {picture.seed}"
    return figure(f"data:image/png;base64,{data}", caption)
