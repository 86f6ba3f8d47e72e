"""The shapes that a graph is used at: smallest, usual, largest. TensorRT builds engines for them, `warmup` runs them.

    profile = {"sample": {"min": [1, 4, 32, 32], "opt": [2, 4, 64, 64], "max": [2, 4, 96, 96]}, …}

Export writes a profile into the manifest's entry of each graph, from the interface of the graph and the model's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Profile", "shape_profile"]

Profile = dict[str, dict[str, list[int]]]

# As many latent positions as the generator puts into one UNet call: 8 guided pictures of 64 px, or one of 512 px.
POSITIONS = 4096
# A search encodes one text; an indexing run encodes pictures by the batch.
TEXTS = (1, 1, 32)
PICTURES = (1, 32, 32)
# Of the side that the model was trained at. Wider would cost TensorRT memory for sizes that few ask for.
SMALLEST_SIDE, LARGEST_SIDE = 0.5, 1.5


def shape_profile(graph: str, inputs: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any]) -> Profile:
    """The profile of a graph, such as "unet".

    Args:
        graph: the name.
        inputs: from its entry in the manifest: for each input a "shape", whose dynamic axes are named.
        manifest: for the model's sizes, "latent", "embedding" and "prompt", and for its "sampler".
    """
    latent = manifest["latent"]
    side = latent["size"] * (latent["scale_factor"] if graph == "vae_encoder" else 1)
    sides = (int(side * SMALLEST_SIDE), side, int(side * LARGEST_SIDE))
    texts = manifest["embedding"] if graph == "clip_text_encoder" else manifest.get("prompt") or manifest["embedding"]
    together = max(1, POSITIONS // (2 * latent["size"] ** 2))  # guided pictures in one call
    rows = 1 if manifest.get("sampler", {}).get("guidance_scale") == 1 else 2  # of a picture
    batch = {
        "text_encoder": TEXTS,
        "clip_text_encoder": TEXTS,
        "image_encoder": PICTURES,
        "unet": (1, rows, 2 * together),
    }.get(graph, (1, 1, together))
    axes = {"batch": batch, "steps": batch, "height": sides, "width": sides, "tokens": (texts["max_tokens"],) * 3}
    return {
        name: {
            bound: [axis if isinstance(axis, int) else axes[axis][i] for axis in described["shape"]]
            for i, bound in enumerate(("min", "opt", "max"))
        }
        for name, described in inputs.items()
    }
