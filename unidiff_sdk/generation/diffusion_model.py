"""The denoiser, a UNet or a transformer, and the VAE of a bundle, as functions of arrays."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk.errors import GenerationError, OptionError, StoreError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import TRANSFORMER, Denoiser, Latent
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule

from .denoising import Conditions
from .img2img import to_samples
from .memory import check_architecture, check_transformer, image_memory

__all__ = ["DiffusionModel"]

Float32 = NDArray[np.float32]


class DiffusionModel:
    """The denoiser and the VAE of a bundle. May be shared between threads.

    Args:
        bundle: the graphs, which load when they are first used.
        positions: the most latent positions that the VAE decodes in one call, half as many as the UNet with guidance.
    """

    def __init__(self, bundle: Bundle, positions: int) -> None:
        self._bundle = bundle
        self._positions = positions
        # Decoding at full size takes the most memory, so one thread decodes at a time.
        self._vae_lock = threading.Lock()

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that every generation needs. The one that takes the longest to load comes first."""
        return self.denoiser.graph, "vae_decoder"

    def predict(self, sample: Float32, timestep: Float32, conditions: Conditions) -> Float32:
        """The denoiser's output for a batch: float32[batch, channels, height, width], as `sample`.

        timestep is float32[batch], and each of the conditions has a row for each sample. Raises GenerationError.
        """
        feeds = {self.denoiser.sample: sample, "timestep": timestep, **conditions}
        return self._run(self.denoiser.graph, feeds, self.denoiser.output, sample.shape)

    def encode(self, image: Image.Image) -> Float32:
        """The latents of an RGB image: float32[channels, height, width]. Raises GenerationError."""
        with self._vae_lock:
            shape = (1, *self.latent_shape(*image.size))
            encoded = self._run("vae_encoder", {"sample": to_samples(image)}, "latent_sample", shape)[0]
        shift, scale = np.float32(self.latent.shift_factor), np.float32(self.latent.scaling_factor)
        latents: Float32 = (encoded - shift) * scale
        return latents

    def decode(self, latents: Float32) -> list[Image.Image]:
        """The RGB images of latents, float32[images, channels, height, width].

        Raises:
            GenerationError: latents or pixels are not finite, or memory does not suffice.
        """
        self._check_finite(latents)  # an 8-bit decoder would return an image in any case
        scaled = latents / np.float32(self.latent.scaling_factor) + np.float32(self.latent.shift_factor)
        batch = max(1, self._positions // (2 * latents.shape[2] * latents.shape[3]))
        images: list[Image.Image] = []
        for start in range(0, len(scaled), batch):
            part = scaled[start : start + batch]
            shape = (len(part), 3, *(side * self.latent.scale_factor for side in part.shape[2:]))
            with self._vae_lock:
                decoded = self._run("vae_decoder", {"latent_sample": part}, "sample", shape)
            self._check_finite(decoded)
            pixels = np.rint((decoded * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8)
            images += [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]
        return images

    def _run(self, graph: str, feeds: dict[str, Float32], output: str, shape: tuple[int, ...]) -> Float32:
        """Call a graph. Raises GenerationError if it fails, or if its output has another shape than `shape`."""
        session = self._bundle.session(graph)
        try:
            result = session.run(feeds, [output])[output]
        except (StoreError, OptionError):
            raise
        except Exception as error:  # the exceptions of an engine have no common base class
            raise GenerationError(f"a call of the {graph} failed ({error})") from error
        if result.shape != shape:
            raise GenerationError(
                f"{self._bundle.path}: the {graph} returns the shape {list(result.shape)}, but the sizes in the "
                f"manifest give {list(shape)}; export the bundle again"
            )
        return result

    def _check_finite(self, values: Float32) -> None:
        if not np.isfinite(values).all():
            raise GenerationError(
                f"the {self._bundle.precision} bundle {self._bundle.path} generated values that are not finite; lower "
                "guidance_scale, or export it at a higher precision"
            )

    # Sizes

    @property
    def latent(self) -> Latent:
        """Sizes and scales of the latents."""
        return self._bundle.latent

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """The shape of the latents of an image: channels, height, width."""
        scale = self.latent.scale_factor
        return self.latent.channels, height // scale, width // scale

    @property
    def default_side(self) -> int:
        """The side, in pixels, that the denoiser was trained at."""
        return self.latent.size * self.latent.scale_factor

    @cached_property
    def denoiser(self) -> Denoiser:
        """The graph that denoises."""
        return self._bundle.manifest.denoiser

    @property
    def block(self) -> int:
        """The sides of an image are multiples of this many pixels.

        Each block of a UNet but the last halves them, and a transformer takes patches.
        """
        config = self.denoiser_config
        if self.denoiser is TRANSFORMER:
            return int(self.latent.scale_factor * config["patch_size"])
        return int(self.latent.scale_factor * 2 ** (len(config["block_out_channels"]) - 1))

    @property
    def largest_side(self) -> int | None:
        """The largest side of an image in pixels, where the positions of a transformer end. None for a UNet."""
        if self.denoiser is not TRANSFORMER:
            return None
        return int(self.denoiser_config["pos_embed_max_size"] * self.block)

    def image_memory(self, width: int, height: int, predictions: int) -> int:
        """Bytes that one image of that size in pixels takes, see `memory.image_memory`."""
        _, rows, columns = self.latent_shape(width, height)
        tokens = self._bundle.manifest.state_tokens
        return image_memory(self.denoiser_config, self.decoder_config, columns, rows, predictions, tokens)

    @cached_property
    def schedule(self) -> Schedule | FlowSchedule:
        return self._bundle.schedule()

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        file = f"{self.denoiser.graph}/config.json"
        if self.denoiser is not TRANSFORMER:
            return self._architecture(file)
        config = self._bundle.config(file)
        check_transformer(config, self._bundle.path / file)
        return config

    @cached_property
    def decoder_config(self) -> dict[str, Any]:
        return self._architecture("vae_decoder/config.json")

    def _architecture(self, file: str) -> dict[str, Any]:
        config = self._bundle.config(file)
        check_architecture(config, self._bundle.path / file)
        return config
