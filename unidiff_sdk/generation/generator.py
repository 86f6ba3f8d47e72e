"""Prompts to pictures: what is asked for becomes jobs, `batching` denoises them, the VAE decodes them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.images import ImageSource
from unidiff_sdk._internal.memory import available_memory, readable_size
from unidiff_sdk._internal.weak_method import weak_method
from unidiff_sdk.errors import GenerationError, OptionError, UniDiffError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import Latent
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.inference.shape_profiles import POSITIONS_PER_CALL

from .batching import MAX_REQUESTS, Engine, Job, Kept, Step
from .conditioning import Conditioner
from .img2img import first_step, fitted, latent_mask, load_mask, put_back, read_image, to_samples
from .memory import picture_memory
from .options import GenerationOptions, ResolvedOptions, checked_prompts, default_strength
from .samplers import Table, make_table

__all__ = ["Generator", "Preview"]

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]

_CACHED_TABLES = 32
# Bytes that any process finds: whether there is more is asked of the system, which takes a fifth of a millisecond.
_SURELY_THERE = 32 * 2**20


@dataclass(frozen=True)
class _Original:
    """The picture that a generation starts from: its pixels, its latents, and where it is repainted, if not all over.

    latents: float32[channels, height, width]. repaint: bool[height, width] in pixels.
    """

    image: Image.Image
    latents: Float32
    repaint: NDArray[np.bool_] | None


class Preview:
    """A look at pictures under way.

    Attributes:
        done, total: steps, summed over the pictures of the call.
    """

    def __init__(self, step: Step, decode: Callable[[Float32], list[Image.Image]]) -> None:
        self.done, self.total = step.done, step.total
        self._step, self._decode = step, decode

    def images(self) -> list[Image.Image]:
        """The pictures as they are foreseen now, in the order of the result. It costs a call of the decoder."""
        return self._decode(self._step.estimates())


class Generator:
    """The UNet, text encoder and VAE of a bundle. May be shared between threads, whose calls then share UNet calls.

    Args:
        bundle: the graphs.
        positions: how many latent positions there are in one UNet call at most, twice with guidance. At 1 every picture
            has its calls for itself and is bit for bit the same whatever is drawn at the same time.
        max_requests: how many calls of `generate` may be under way; one more raises BusyError.
        available_memory: returns the bytes that the process may still allocate, or None if unknown.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        positions: int = POSITIONS_PER_CALL,
        max_requests: int = MAX_REQUESTS,
        available_memory: Callable[[], int | None] = available_memory,
    ) -> None:
        self.bundle = bundle
        self._positions = positions
        self._available_memory = available_memory
        self._conditioner = Conditioner(bundle)
        self._table_of = lru_cache(maxsize=_CACHED_TABLES)(weak_method(self._make_table))
        self._engine = Engine(weak_method(self._predict), positions=positions, max_requests=max_requests)
        # Decoding at full size is what takes memory, so one thread decodes at a time.
        self._vae_lock = threading.Lock()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | None = "",
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        width: int | None = None,
        height: int | None = None,
        like: ImageSource | None = None,
        strength: float | None = None,
        mask: ImageSource | None = None,
        long_prompts: str = "truncate",
        latents: Float32 | None = None,
        callback: Progress | None = None,
        preview: Callable[[Preview], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `n` pictures of each prompt: RGB images, those of the first prompt first.

        The k-th picture of a prompt is that of the seed `seed + k`, whatever it is drawn beside. ONNX Runtime's sums
        depend on how many rows a call has: on a CPU no pixel differs from drawing it alone by more than 1/255 in fp32
        and 2/255 in fp16. In int8 a sum may fall to the next code, and no bound is promised. With `positions=1` none
        differs at all, at any precision.

        Args:
            prompts: what to draw.
            negative_prompt: what guidance leads away from.
            n: how many pictures of each prompt.
            seed: 0 or more.
            steps: of the sampler; None for the bundle's default, as with the other options.
            guidance_scale: 0 to 50. 1 is no guidance, at half the work (Ho & Salimans 2022, arXiv:2207.12598).
            guidance_rescale: 0 to 1; takes back the contrast that high scales add (Lin et al. 2023, arXiv:2305.08891,
                where 0.7 is recommended).
            sampler: a name in `unidiff_sdk.generation.samplers.SAMPLERS`.
            width, height: pixels, multiples of what the UNet halves and the VAE enlarges.
            like: a picture to start from, cut or padded to that size as the model's training pictures were.
            strength: above 0 to 1, with `like`: how far it is taken back to noise, and so how much may change. It
                takes that share of the steps. Default 0.7; with a mask 1, which forgets what was there.
            mask: with `like`: a picture, bright where it is repainted; everything else stays pixel for pixel.
            long_prompts: "truncate" leaves out what exceeds `bundle.prompt_tokens` tokens, with a warning; "chunk"
                encodes it in windows.
            latents: standard normal noise to start from, float32[pictures, channels, height, width] of the latent size,
                instead of that of `seed`.
            callback: called with (steps done, steps in all) after each step; what it raises ends the generation.
            preview: the same, called with a `Preview`.

        Raises:
            OptionError: an argument is out of its range.
            ImageError: `like` or `mask` cannot be read.
            GenerationError: `latents` does not fit, there is not the memory, or the result is not finite.
            BusyError: as many calls as are allowed are under way.
        """
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
            long_prompts=long_prompts,
            like=like,
            strength=strength,
            mask=mask,
        )
        return self.run(prompts, options, latents=latents, callback=callback, preview=preview)

    def run(
        self,
        prompts: str | Sequence[str],
        options: GenerationOptions,
        *,
        latents: Float32 | None = None,
        callback: Progress | None = None,
        preview: Callable[[Preview], None] | None = None,
    ) -> list[Image.Image]:
        """`generate`, with its settings as one object.

        Raises:
            OptionError: as `generate`; or the options ask for a selection, which `Catalog.generate` makes.
            ImageError, GenerationError, BusyError: as `generate`.
        """
        # 1. Check the request against the bundle
        if options.selects:
            raise OptionError(
                "best_of, min_score, max_similarity, budget and safety select images; use Catalog.generate for that"
            )
        prompts, options = checked_prompts(prompts), self.resolve(options)
        if not prompts:
            return []
        # Errors of the graphs are raised here, in the calling thread. Loading them also takes memory first.
        for graph in ("unet", "vae_decoder"):
            self.bundle.session(graph)
        self._check_memory(options, len(prompts) * options.n)

        # 2. Prepare the start: an image, or noise
        original = self._original(options)
        table, pure_noise = self._table(options, original)
        streams = [_stream(options.seed + k) for _ in prompts for k in range(options.n)]
        noise = self._noise(streams, options) if latents is None else self._checked_noise(latents, streams, options)

        # 3. Denoise, in batches shared with the other requests
        conditions = [self._condition(prompt, options) for prompt in prompts]
        jobs = [
            self._job(conditions[i // options.n], options, table, original, pure_noise, noise[i], stream)
            for i, stream in enumerate(streams)
        ]

        def on_step(step: Step) -> None:
            if callback is not None:
                callback(step.done, step.total)
            if preview is not None:
                preview(Preview(step, self._decode))

        latents = self._engine.denoise(jobs, on_step if callback or preview else None)

        # 4. Decode
        images = self._decode(latents)
        if original is not None and original.repaint is not None:
            images = [put_back(image, original.image, original.repaint) for image in images]
        return images

    def resolve(self, options: GenerationOptions) -> ResolvedOptions:
        """Fill in the bundle's defaults, and a random seed, for what `options` leaves open.

        Raises:
            OptionError: the bundle cannot generate with these options.
        """
        if isinstance(options, ResolvedOptions):
            return options
        defaults: dict[str, Any] = {
            "seed": secrets.randbelow(2**32),
            "steps": self.bundle.manifest.sampler.steps,
            "guidance_scale": float(self.bundle.manifest.sampler.guidance_scale),
            "sampler": self.bundle.manifest.sampler.name,
            "strength": None if options.like is None else default_strength(masked=options.mask is not None),
        }
        given = {name: value for name, value in vars(options).items() if value is not None}
        sides = {name: self._checked_side(name, getattr(options, name)) for name in ("width", "height")}
        resolved = ResolvedOptions(**defaults | given | sides)
        self._table_of(resolved.sampler, resolved.steps)  # raises for an unknown sampler and too many steps
        if resolved.negative_prompt and not resolved.guided:
            raise OptionError("negative_prompt has no effect at guidance_scale 1; raise the scale, or omit the prompt")
        return resolved

    # What is asked for

    def _checked_side(self, name: str, side: int | None) -> int:
        """A side in pixels."""
        scale = self._latent.scale_factor
        if side is None:
            return self._latent.size * scale
        # each block of the UNet but the last halves the latents
        block = int(scale * 2 ** (len(self._unet_config["block_out_channels"]) - 1))
        if isinstance(side, bool) or not isinstance(side, int) or side < block or side % block:
            below = max(block, side // block * block) if isinstance(side, int) else block
            raise OptionError(
                f"{name} is {side!r}; give a multiple of {block} pixels, such as {below} or {below + block}"
            )
        return side

    def _check_memory(self, options: ResolvedOptions, pictures: int) -> None:
        if self.bundle.device != "cpu":
            return
        _, height, width = self._latent_shape(options)
        rows = 2 if options.guided else 1
        together = min(pictures, max(1, self._positions // (rows * height * width)))
        needed = together * picture_memory(self._unet_config, self._decoder_config, width, height, rows)
        available = self._available_memory() if needed > _SURELY_THERE else None
        if available is not None and needed > available:
            raise GenerationError(
                f"{_counted(together)} of {options.width} x {options.height} pixels would take about "
                f"{readable_size(needed)} of memory, and {readable_size(available)} are left; make it smaller"
            )

    def _latent_shape(self, options: ResolvedOptions) -> tuple[int, int, int]:
        scale = self._latent.scale_factor
        return self._latent.channels, options.height // scale, options.width // scale

    def _noise(self, streams: list[np.random.Generator], options: ResolvedOptions) -> Float32:
        shape = self._latent_shape(options)
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])

    def _checked_noise(self, latents: Any, streams: list[np.random.Generator], options: ResolvedOptions) -> Float32:
        expected = (len(streams), *self._latent_shape(options))
        noise: Float32 = np.asarray(latents, np.float32)
        if noise.shape != expected:
            raise GenerationError(f"latents have the shape {list(noise.shape)}; this call needs {list(expected)}")
        if not np.isfinite(noise).all():
            raise GenerationError("latents hold values that are not finite")
        return noise

    def _original(self, options: ResolvedOptions) -> _Original | None:
        if options.like is None:
            return None
        width, height, fit = options.width, options.height, self.bundle.image_fit
        image = fitted(read_image(options.like), width, height, fit)
        repaint = None if options.mask is None else load_mask(options.mask, width, height, fit)
        return _Original(image, self._encode(image), repaint)

    def _table(self, options: ResolvedOptions, original: _Original | None) -> tuple[Table, bool]:
        """The steps to run, and whether they start from noise alone."""
        table = self._table_of(options.sampler, options.steps)
        if original is None or options.strength is None:
            return table, True
        step = first_step(options.strength, options.steps)
        return (table.starting_at(step) if step else table), original.repaint is not None and options.strength == 1

    def _make_table(self, sampler: str, steps: int) -> Table:
        return make_table(sampler, self._schedule, steps)

    def _condition(self, prompt: str, options: ResolvedOptions) -> tuple[Float32, Float32 | None]:
        """The token states of the prompt and, for guidance, of the negative prompt."""
        if not options.guided:
            return self._conditioner.states(prompt, options.long_prompts), None
        return self._conditioner.pair(prompt, options.negative_prompt, options.long_prompts)

    def _job(
        self,
        condition: tuple[Float32, Float32 | None],
        options: ResolvedOptions,
        table: Table,
        original: _Original | None,
        pure_noise: bool,
        noise: Float32,
        stream: np.random.Generator,
    ) -> Job:
        x, kept = noise * np.float32(table.init_noise_sigma), None
        if original is not None:
            of_clean, of_noise = table.levels[0]
            x = x if pure_noise else of_clean * original.latents + of_noise * noise
            if original.repaint is not None:
                kept = Kept(original.latents, noise, latent_mask(original.repaint, self._latent.scale_factor))
        return Job(table, x, *condition, options.guidance_scale, options.guidance_rescale, stream, kept)

    # The graphs

    def _predict(self, sample: Float32, timestep: Float32, states: Float32) -> Float32:
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states}
        return self._run("unet", "out_sample", inputs)

    def _run(self, graph: str, output: str, inputs: dict[str, Float32]) -> Float32:
        """A call of a graph. Raises GenerationError where ONNX Runtime has not the memory, or fails otherwise."""
        try:
            result: Float32 = self.bundle.session(graph).run(inputs, [output])[output]
        except UniDiffError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise GenerationError(f"a call of the {graph} failed ({error})") from error
        return result

    def _encode(self, image: Image.Image) -> Float32:
        """The latents of a picture: float32[channels, height, width]."""
        with self._vae_lock:
            encoded = self._run("vae_encoder", "latent_sample", {"sample": to_samples(image)})[0]
        shift, scale = np.float32(self._latent.shift_factor), np.float32(self._latent.scaling_factor)
        latents: Float32 = (encoded - shift) * scale
        return latents

    def _decode(self, latents: Float32) -> list[Image.Image]:
        self._check_finite(latents)  # an 8-bit decoder would make a picture of anything
        scaled = latents / np.float32(self._latent.scaling_factor) + np.float32(self._latent.shift_factor)
        size = max(1, self._positions // (2 * latents.shape[2] * latents.shape[3]))
        images: list[Image.Image] = []
        for start in range(0, len(scaled), size):
            with self._vae_lock:
                decoded = self._run("vae_decoder", "sample", {"latent_sample": scaled[start : start + size]})
            self._check_finite(decoded)
            pixels = np.rint((decoded * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8)
            images += [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]
        return images

    def _check_finite(self, drawn: Float32) -> None:
        if not np.isfinite(drawn).all():
            raise GenerationError(
                f"the {self.bundle.precision} bundle {self.bundle.path} drew something that is not finite; "
                "lower guidance_scale, or export it at a higher precision"
            )

    # Parts that load when they are first used

    @cached_property
    def _schedule(self) -> Schedule:
        return self.bundle.schedule()

    @cached_property
    def _unet_config(self) -> dict[str, Any]:
        return self.bundle.config("unet/config.json")

    @cached_property
    def _decoder_config(self) -> dict[str, Any]:
        return self.bundle.config("vae_decoder/config.json")

    @property
    def _latent(self) -> Latent:
        return self.bundle.manifest.latent


def _stream(seed: int) -> np.random.Generator:
    """All the noise of one picture. A counter-based generator: neighboring seeds have nothing in common."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))


def _counted(pictures: int) -> str:
    return "a picture" if pictures == 1 else f"{pictures} pictures at once"
