"""The shapes that a graph is used at: smallest, usual, largest. TensorRT builds engines for them; `warmup` runs them.

    profile = {"sample": {"min": [1, 4, 32, 32], "opt": [2, 4, 64, 64], "max": [2, 4, 96, 96]}, …}

The export writes a profile into the manifest's entry of each graph, from the graph's inputs and the model's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import BundleError, OptionError

from .manifest import GENERATION_GRAPHS, Latent, ModelDescription, Profile, SamplerDefaults, TensorSpec

if TYPE_CHECKING:
    from .sessions import Session

__all__ = ["POSITIONS_PER_CALL", "ProfiledSession", "shape_profile"]

POSITIONS_PER_CALL = 4096
"""The most latent positions in one UNet call: 8 guided images of 64 px, or one of 512 px. Larger calls are no faster on
a CPU."""

# A search encodes one text; indexing encodes images by the batch.
TEXTS = (1, 1, 32)
IMAGES = (1, 32, 32)
# Relative to the side that the model was trained at. A wider range costs TensorRT memory for sizes that are rare.
SMALLEST_SIDE, LARGEST_SIDE = 0.5, 1.5


def shape_profile(graph: str, inputs: Mapping[str, TensorSpec], model: ModelDescription) -> Profile:
    """The profile of a graph.

    Args:
        graph: its name, such as "unet".
        inputs: with names for the dynamic axes: "batch", "steps", "height", "width", "tokens".
        model: sizes of latents and texts, and the default guidance.

    Raises:
        BundleError: an axis has another name.
    """
    tokens = model.state_tokens if graph == model.denoiser.graph else model.prompt_tokens
    if graph == "clip_text_encoder" and model.embedding is not None:
        tokens = model.embedding.max_tokens
    axes = {"batch": {"image_encoder": IMAGES}.get(graph, TEXTS), "tokens": (tokens,) * 3}
    if graph in GENERATION_GRAPHS and model.latent is not None and model.sampler is not None:
        axes |= _generation_axes(graph, model.latent, model.sampler, denoises=graph == model.denoiser.graph)
    for name, tensor in inputs.items():
        for axis in tensor.shape:
            if not isinstance(axis, int) and axis not in axes:
                raise BundleError(
                    f"the manifest names the axis {axis!r:.60} of {name:.60}, an input of the graph {graph}. "
                    f"Known axes: {', '.join(axes)}. Export the bundle again."
                )
    return {
        name: {
            bound: [axis if isinstance(axis, int) else axes[axis][i] for axis in tensor.shape]
            for i, bound in enumerate(("min", "opt", "max"))
        }
        for name, tensor in inputs.items()
    }


def _generation_axes(
    graph: str, latent: Latent, sampler: SamplerDefaults, *, denoises: bool
) -> dict[str, tuple[int, int, int]]:
    """Smallest, usual and largest size of the axes of a graph that generates."""
    side = latent.size * (latent.scale_factor if graph == "vae_encoder" else 1)
    sides = (int(side * SMALLEST_SIDE), side, int(side * LARGEST_SIDE))
    images = max(1, POSITIONS_PER_CALL // (2 * latent.size**2))  # guided, in one call
    predictions = 1 if sampler.guidance_scale == 1 else 2  # for each image
    batch = (1, predictions, 2 * images) if denoises else (1, 1, images)
    return {"batch": batch, "steps": batch, "height": sides, "width": sides}


class ProfiledSession:
    """Keeps calls within the shapes that an engine was built for: splits larger batches, checks the other axes."""

    def __init__(self, session: Session, profile: Profile) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.providers, self.captured = session.providers, session.captured
        self._session, self._profile = session, profile

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        self._check(feeds)
        batch = max(len(array) for array in feeds.values())
        largest = min(bounds["max"][0] for bounds in self._profile.values())
        parts = []
        for start in range(0, batch, largest):
            part = {
                name: array[start : start + largest] if len(array) == batch else array for name, array in feeds.items()
            }
            parts.append(self._session.run(part, outputs))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        for name, array in feeds.items():
            bounds = self._profile[name]
            for least, size, most in zip(bounds["min"][1:], array.shape[1:], bounds["max"][1:], strict=True):
                if not least <= size <= most:
                    raise OptionError(
                        f"{name} has the shape {list(array.shape)}, but the TensorRT engine accepts {bounds['min']} to "
                        f"{bounds['max']}; choose another size, or open the bundle with device='cuda'"
                    )
