"""Prompts to images: a request becomes a job for each image, which is denoised and decoded."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.images import ImageSource
from unidiff_sdk._internal.lifetimes import weak_method
from unidiff_sdk._internal.memory import available_memory, readable_size
from unidiff_sdk.errors import GenerationError, OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.engines.adapters import Loras
from unidiff_sdk.inference.shape_profiles import POSITIONS_PER_CALL

from .batching import MAX_REQUESTS, Batcher
from .conditioning import Conditioner
from .denoising import Conditions, Job, KnownRegion, Progress
from .diffusion_model import DiffusionModel
from .img2img import SourceImage, first_step, fit_image, load_source
from .options import GenerationOptions, ResolvedOptions, checked_prompts, default_strength
from .samplers import Table, make_table, prediction

__all__ = ["Generator", "Preview", "image_rng"]

Float32 = NDArray[np.float32]
Callback = Callable[[int, int], None]

CACHED_TABLES = 32
ADAPTER_DEVICES = ("cpu", "cuda")  # those of ONNX Runtime that take optional inputs
QUERY_SEED = 0
MAX_QUERY_STEPS = 6  # half of the built-in model's steps; enough for the encoder to recognize what an image shows
# So little memory is always available. Above it the system is asked, which takes a fifth of a millisecond.
SMALL_MEMORY = 32 * 2**20


class Preview:
    """The images of a running generation.

    Attributes:
        done, total: steps, summed over the images of the call.
    """

    def __init__(self, progress: Progress, decode: Callable[[Float32], list[Image.Image]]) -> None:
        self.done, self.total = progress.done, progress.total
        self._progress, self._decode = progress, decode

    def images(self) -> list[Image.Image]:
        """The current estimate of the images, in the order of the result. Costs a call of the decoder."""
        return self._decode(self._progress.estimates())


class Generator:
    """Generates images with the UNet, text encoder and VAE of a bundle.

    May be shared between threads. Their calls of `generate` then share calls of the UNet.

    Args:
        bundle: the graphs.
        positions: the most latent positions in one UNet call, twice an image's with guidance. With 1, each image has
            its own calls, and is bit for bit the same whatever is generated at the same time.
        max_requests: the most calls of `generate` at the same time. One more raises BusyError.
        available_memory: returns the bytes that the process may still allocate, or None if unknown.

    Raises:
        BundleError: the bundle has no generator.
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
        self._defaults = bundle.sampler
        self._positions = positions
        self._available_memory = available_memory
        self._conditioner = Conditioner(bundle)
        self._model = DiffusionModel(bundle, positions)
        self._batcher = Batcher(self._model.predict, positions=positions, max_requests=max_requests)
        self._sampler_table = lru_cache(maxsize=CACHED_TABLES)(weak_method(self._make_table))

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
        lora: str | Iterable[str] | Mapping[str, float | None] | None = None,
        long_prompts: str = "truncate",
        latents: Float32 | None = None,
        callback: Callback | None = None,
        preview: Callable[[Preview], None] | None = None,
    ) -> list[Image.Image]:
        """Generate `n` RGB images for each prompt, those of the first prompt first.

        The k-th image of a prompt is that of the seed `seed + k`, whatever is generated at the same time. The sums in
        ONNX Runtime depend on the batch size of a call: on a CPU no pixel differs from the image generated alone by
        more than 1/255 in fp32 and 2/255 in fp16. In int8 a sum may round to the next code, and no bound is promised.
        With `positions=1` no pixel differs, at any precision.

        Args:
            prompts: what to generate.
            negative_prompt: what guidance leads away from.
            n: number of images for each prompt.
            seed: 0 or more.
            steps: number of denoising steps. None: the bundle's default, as for the options below.
            guidance_scale: 0 to 50 (Ho & Salimans 2022, arXiv:2207.12598). Up to 1, guidance is off, which
                halves the work.
            guidance_rescale: 0 to 1; removes the contrast that a high guidance_scale adds (Lin et al. 2023,
                arXiv:2305.08891, which recommends 0.7).
            sampler: a name in `unidiff_sdk.generation.samplers.SAMPLERS`; in `FLOW_SAMPLERS` for Stable Diffusion 3.
            width, height: in pixels, multiples of the model's smallest block.
            like: an image to start from, cropped or padded to the size as the training images were.
            strength: above 0, up to 1, with `like`: how much of the image may change. The generation runs this share of
                the steps. Default: 0.7; with a mask 1, which forgets the image where it is repainted.
            mask: with `like`: an image that is bright where to repaint. All other pixels stay as they are, also
                where the mask is transparent.
            lora: LoRAs of `bundle.loras` to switch on: a name, several names, or a weight for each name.
            long_prompts: for prompts longer than `bundle.prompt_tokens`: "truncate" ignores the rest with a warning,
                "chunk" encodes the prompt in windows.
            latents: standard normal noise to start from, float32[images, channels, height, width] of the latents'
                size, instead of that of `seed`.
            callback: called with (steps done, steps in total) after each step. An exception from it ends the
                generation.
            preview: called with a `Preview` after each step. An exception from it ends the generation.

        Raises:
            OptionError: an argument is out of range.
            ImageError: `like` or `mask` cannot be read.
            GenerationError: `latents` has another shape, memory does not suffice, or the result is not finite.
            BusyError: too many generations are running.
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
            lora=lora,
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
        callback: Callback | None = None,
        preview: Callable[[Preview], None] | None = None,
    ) -> list[Image.Image]:
        """`generate`, with its options as one object.

        Raises:
            OptionError: as `generate`; or the options ask for a selection, which needs `Catalog.generate`.
            ImageError, GenerationError, BusyError: as `generate`.
        """
        # 1. Check the request
        if options.selects:
            raise OptionError(
                "best_of, min_score, max_similarity, budget and safety select images; use Catalog.generate for that"
            )
        prompts, options = checked_prompts(prompts), self.resolve(options)
        if not prompts:
            return []
        self.load()  # raises in the calling thread; and the weights take memory first
        self._check_memory(options, len(prompts) * options.n)

        # 2. Prepare a job for each image
        source = load_source(options, self.bundle.image_fit, self._model.encode)
        table = self._table(options)
        rngs = [image_rng(options.seed + k) for _ in prompts for k in range(options.n)]
        noise = self._noise(rngs, options) if latents is None else self._checked_noise(latents, len(rngs), options)
        per_prompt = [self._conditions(prompt, options) for prompt in prompts]
        conditions = [each for each in per_prompt for _ in range(options.n)]
        jobs = [self._job(*inputs, options, table, source) for inputs in zip(conditions, noise, rngs, strict=True)]

        # 3. Denoise, in calls shared with other requests
        def on_step(progress: Progress) -> None:
            if callback is not None:
                callback(progress.done, progress.total)
            if preview is not None:
                preview(Preview(progress, self._model.decode))

        denoised = self._batcher.denoise(jobs, on_step if callback or preview else None)

        # 4. Decode
        images = self._model.decode(denoised)
        return images if source is None else [source.restore(image) for image in images]

    def load(self, *others: str) -> None:
        """Load the graphs that every generation needs, and others that the caller will use, if they are not yet loaded.

        Raises:
            BundleError, ProviderError: a graph cannot be loaded.
        """
        self.bundle.load(*self._model.graphs, *self._conditioner.graphs, *others)

    def stop(self, reason: str) -> None:
        """End all running and waiting calls with a StoreError, and refuse new ones."""
        self._batcher.stop(reason)

    def query_images(self, texts: Sequence[str], n: int) -> list[Image.Image]:
        """`n` images of each text query, to search with: in few steps, and the same ones for the same texts."""
        steps = min(self._defaults.steps, MAX_QUERY_STEPS)
        return self.generate(texts, n=n, seed=QUERY_SEED, steps=steps)

    # The model itself, for scores (`retrieval.reranking`)

    def latents(self, image: Image.Image) -> Float32:
        """The latents that the UNet was trained on for an RGB image: float32[channels, height, width].

        The image is cropped or padded to the training size first. Raises GenerationError.
        """
        side = self._model.default_side
        latents = self._model.encode(fit_image(image, side, side, self.bundle.image_fit))
        if not np.isfinite(latents).all():
            raise GenerationError(
                f"the VAE encoder of the {self.bundle.precision} bundle {self.bundle.path} returns latents that are "
                "not finite; export it at a higher precision"
            )
        return latents

    def conditions(self, text: str) -> Conditions:
        """What conditions the UNet on a text at its training size; on none, if it is empty. A long text is truncated.

        The arrays are read-only.
        """
        of_text = self._conditioner.conditions if text else self._conditioner.negative_conditions
        side = self._model.default_side
        return self._conditioner.completed(of_text(text), side, side)

    def predict(
        self, samples: Sequence[Float32], timesteps: Sequence[int], conditions: Sequence[Conditions]
    ) -> Float32:
        """The UNet's outputs for noisy latents, in calls that are shared with running generations.

        Args:
            samples: latents with noise, each float32[channels, height, width], all of one shape.
            timesteps: the timestep of each.
            conditions: those of each, see `conditions`.

        Returns:
            float32[len(samples), channels, height, width]

        Raises:
            GenerationError: the UNet failed.
            BusyError: too many generations are running.
        """
        tables = {timestep: prediction(timestep) for timestep in set(timesteps)}
        unused = image_rng(0)  # no row of these tables adds noise
        jobs = [
            Job(tables[timestep], sample, each, None, 1.0, 0.0, unused)
            for sample, timestep, each in zip(samples, timesteps, conditions, strict=True)
        ]
        self.bundle.session(self._model.denoiser.graph)  # raises in the calling thread
        return self._batcher.denoise(jobs)

    def resolve(self, options: GenerationOptions) -> ResolvedOptions:
        """Fill in the bundle's defaults, and a random seed, for what `options` leaves open.

        Raises:
            OptionError: the bundle cannot generate with these options.
        """
        if isinstance(options, ResolvedOptions):
            return options
        defaults: dict[str, Any] = {
            "seed": secrets.randbelow(2**32),
            "steps": self._defaults.steps,
            "guidance_scale": float(self._defaults.guidance_scale),
            "sampler": self._defaults.name,
            "width": self._model.default_side,
            "height": self._model.default_side,
            "strength": None if options.like is None else default_strength(masked=options.mask is not None),
        }
        given = {name: value for name, value in vars(options).items() if value is not None}
        if options.lora is not None:
            given["lora"] = self._resolve_loras(options.lora)
        resolved = ResolvedOptions(**defaults | given)
        for name in ("width", "height"):
            if name in given:
                self._check_side(name, given[name])
        self._sampler_table(resolved.sampler, resolved.steps)  # raises for an unknown sampler and too many steps
        if resolved.negative_prompt and not resolved.guided:
            raise OptionError(
                f"negative_prompt has no effect at guidance_scale {resolved.guidance_scale:g}; give a scale above 1, "
                "or omit the negative prompt"
            )
        if resolved.guidance_rescale and not resolved.guided:
            raise OptionError(
                f"guidance_rescale has no effect at guidance_scale {resolved.guidance_scale:g}; give a scale above 1, "
                "or omit it"
            )
        return resolved

    # Checks

    def _resolve_loras(self, chosen: Any) -> Loras:
        loras = self.bundle.adapters.resolve(chosen)
        if self.bundle.device not in ADAPTER_DEVICES:
            raise OptionError(
                f"lora needs device {' or '.join(ADAPTER_DEVICES)}, and the bundle is open on {self.bundle.device!r}. "
                "Merge the LoRA into an export of its own: unidiff-export --lora FILE"
            )
        return loras

    def _check_side(self, name: str, side: Any) -> None:
        block = self._model.block
        if isinstance(side, bool) or not isinstance(side, int) or side < block or side % block:
            below = max(block, side // block * block) if isinstance(side, int) else block
            raise OptionError(
                f"{name} is {side!r}; give a multiple of {block} pixels, such as {below} or {below + block}"
            )
        largest = self._model.largest_side
        if largest is not None and side > largest:
            raise OptionError(f"{name} is {side}; this model has positions for at most {largest} pixels")

    def _check_memory(self, options: ResolvedOptions, images: int) -> None:
        if self.bundle.device not in ("cpu", "auto"):
            return
        _, height, width = self._model.latent_shape(options.width, options.height)
        predictions = 2 if options.guided else 1
        together = min(images, max(1, self._positions // (predictions * height * width)))
        per_image = self._model.image_memory(options.width, options.height, predictions)
        needed = together * per_image
        available = self._available_memory() if needed > SMALL_MEMORY else None
        if available is not None and needed > available:
            raise GenerationError(
                f"{_counted(together)} of {options.width} x {options.height} pixels needs about "
                f"{readable_size(needed)} of memory, but only {readable_size(available)} is available; choose a "
                "smaller size"
            )

    def _checked_noise(self, latents: Any, images: int, options: ResolvedOptions) -> Float32:
        expected = (images, *self._model.latent_shape(options.width, options.height))
        noise: Float32 = np.asarray(latents, np.float32)
        if noise.shape != expected:
            raise GenerationError(f"latents has the shape {list(noise.shape)}; this call needs {list(expected)}")
        if not np.isfinite(noise).all():
            raise GenerationError("latents holds values that are not finite")
        return noise

    # Jobs

    def _make_table(self, sampler: str, steps: int) -> Table:
        return make_table(sampler, self._model.schedule, steps)

    def _table(self, options: ResolvedOptions) -> Table:
        """The steps to run: those that the strength leaves."""
        table = self._sampler_table(options.sampler, options.steps)
        skipped = 0 if options.strength is None else first_step(options.strength, options.steps)
        return table.starting_at(skipped) if skipped else table

    def _noise(self, rngs: list[np.random.Generator], options: ResolvedOptions) -> Float32:
        shape = self._model.latent_shape(options.width, options.height)
        return np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])

    def _conditions(self, prompt: str, options: ResolvedOptions) -> tuple[Conditions, Conditions | None]:
        """The conditions of the prompt and, for guidance, of the negative prompt."""
        conditioner, size = self._conditioner, (options.width, options.height)
        if not options.guided:
            return conditioner.completed(
                conditioner.conditions(prompt, options.long_prompts, options.lora), *size
            ), None
        prompted, negative = conditioner.pair(prompt, options.negative_prompt, options.long_prompts, options.lora)
        return conditioner.completed(prompted, *size), conditioner.completed(negative, *size)

    def _job(
        self,
        conditions: tuple[Conditions, Conditions | None],
        noise: Float32,
        rng: np.random.Generator,
        options: ResolvedOptions,
        table: Table,
        source: SourceImage | None,
    ) -> Job:
        x, known = noise * np.float32(table.init_noise_sigma), None
        if source is not None:
            clean, noisy = table.levels[0]
            if source.repaint is None or options.strength != 1:
                x = clean * source.latents + noisy * noise
            if source.repaint is not None:
                known = KnownRegion(source.latents, noise, source.latent_mask(self._model.latent.scale_factor))
        shared = self.bundle.adapters.inputs(self._model.denoiser.graph, options.lora)
        loras = options.lora if shared else ()
        return Job(table, x, *conditions, options.guidance_scale, options.guidance_rescale, rng, known, loras, shared)


def image_rng(seed: int) -> np.random.Generator:
    """All the noise of one image. A counter-based generator: neighboring seeds have nothing in common."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))


def _counted(images: int) -> str:
    return "1 image" if images == 1 else f"a batch of {images} images"
