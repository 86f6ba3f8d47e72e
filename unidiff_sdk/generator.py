"""Prompts to pictures: guidance, the denoising loop, decoding. The samplers' mathematics is in `samplers`."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .bundle import Bundle
from .encoder import load_tokenizer, token_ids
from .errors import GenerationError, OptionError
from .samplers import Row, Schedule, Table, advance, make_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Generator", "Settings"]

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]

MAX_GUIDANCE_SCALE = 50.0
MAX_ENLARGEMENT = 4  # of the area that the model was trained at: attention's memory grows with its square
# Latent positions in one UNet call: 8 guided pictures of 64 px, or one of 512 px. Larger calls are no faster on a CPU.
_POSITIONS_A_CALL = 4096
_CACHED_PROMPTS = 256


@dataclass(frozen=True)
class Settings:
    """How a picture is made, with nothing left open."""

    sampler: str
    steps: int
    guidance_scale: float
    width: int
    height: int


@dataclass(frozen=True)
class _Picture:
    """One picture that is asked for: its noise is a function of (seed, index), whatever it is drawn beside."""

    prompt: str
    seed: int
    index: int
    latents: Float32 | None


class Generator:
    """The UNet, text encoder and VAE decoder of a bundle. May be shared between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._condition = lru_cache(maxsize=_CACHED_PROMPTS)(self._encode_prompt)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str = "",
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        size: int | tuple[int, int] | None = None,
        callback: Progress | None = None,
        latents: Float32 | None = None,
    ) -> list[Image.Image]:
        """Draw `n` pictures of each prompt: RGB images, those of the first prompt first.

        Picture k of a prompt is the same whatever it is drawn beside: its noise depends on `seed` and k only. On a CPU
        in fp32 no pixel differs by more than 1/255 from drawing it alone.

        Args:
            prompts: what to draw. What exceeds `bundle.prompt_tokens` is cut off, with a warning.
            negative_prompt: what guidance leads away from.
            n: how many pictures of each prompt.
            seed: 0 or more.
            steps: UNet calls for each picture; None for the bundle's default, as with the next three.
            guidance_scale: 0 to 50. 1 is no guidance, at half the work (Ho & Salimans 2022, arXiv:2207.12598).
            sampler: a name in `unidiff_sdk.samplers.SAMPLERS`.
            size: pixels, a side or (width, height).
            callback: called with (UNet calls done, UNet calls in all); what it raises ends the generation.
            latents: standard normal noise to start from, float32[pictures, channels, height, width] of the latent size,
                instead of that of `seed`.

        Raises:
            OptionError: an argument is out of its range.
            GenerationError: `latents` does not fit, or the result is not finite.
        """
        # 1. Settle what the request leaves open
        settings = self.settings(steps=steps, guidance_scale=guidance_scale, sampler=sampler, size=size)
        table = make_table(settings.sampler, self._schedule, settings.steps)
        pictures = self._pictures(prompts, n, seed, latents, settings)
        if negative_prompt and settings.guidance_scale == 1:
            raise OptionError("negative_prompt has no effect at guidance_scale 1; raise the scale, or leave it out")

        # 2. Denoise and decode, as many at a time as fit in one call
        batches = self._batches(pictures, settings)
        calls, total = count(1), len(batches) * settings.steps

        def report() -> None:
            if callback is not None:
                callback(next(calls), total)

        images: list[Image.Image] = []
        for batch in batches:
            images += self._decode(self._denoise(batch, negative_prompt, settings, table, report))
        return images

    def settings(
        self,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> Settings:
        """The settings that `generate` uses for these arguments: those given, else the bundle's defaults.

        Raises:
            OptionError: an argument is out of its range.
        """
        default = self.bundle.manifest["sampler"]
        sampler = default["name"] if sampler is None else sampler
        steps = _integer("steps", default["steps"] if steps is None else steps, at_least=1)
        make_table(sampler, self._schedule, steps)  # knows the valid names and numbers of steps
        guidance_scale = default["guidance_scale"] if guidance_scale is None else guidance_scale
        if not isinstance(guidance_scale, (int, float)) or not 0 <= guidance_scale <= MAX_GUIDANCE_SCALE:
            raise OptionError(f"guidance_scale is {guidance_scale!r}; give a number from 0 to {MAX_GUIDANCE_SCALE:g}")
        width, height = self._checked_size(size)
        return Settings(sampler, steps, float(guidance_scale), width, height)

    # What is asked for

    def _pictures(
        self, prompts: str | Sequence[str], n: int, seed: int, latents: Float32 | None, settings: Settings
    ) -> list[_Picture]:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
            raise OptionError(f"prompts must be a string or a list of strings, not {prompts!r}")
        n = _integer("n", n, at_least=1)
        seed = _integer("seed", seed, at_least=0)
        if seed >= 2**64:
            raise OptionError(f"seed is {seed}; give less than 2**64")
        if latents is None:
            return [_Picture(prompt, seed, index, None) for prompt in prompts for index in range(n)]
        expected = (len(prompts) * n, *self._latent_shape(settings))
        latents = np.asarray(latents, np.float32)
        if latents.shape != expected:
            raise GenerationError(f"latents have the shape {list(latents.shape)}; this call needs {list(expected)}")
        if not np.isfinite(latents).all():
            raise GenerationError("latents hold values that are not finite")
        starts = iter(latents)
        return [_Picture(prompt, seed, index, next(starts)) for prompt in prompts for index in range(n)]

    def _checked_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels."""
        latent = self.bundle.manifest["latent"]
        scale = latent["scale_factor"]
        native = latent["size"] * scale
        if size is None:
            return native, native
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        block = scale * self._unet_downsampling
        limit = MAX_ENLARGEMENT * native**2
        whole = len(sides) == 2 and all(isinstance(side, int) and side >= block and side % block == 0 for side in sides)
        if not whole or math.prod(sides) > limit:
            raise OptionError(
                f"size is {size!r}; give a side or (width, height) in multiples of {block} pixels, "
                f"at most {math.isqrt(limit)} x {math.isqrt(limit)} in all"
            )
        width, height = sides
        return width, height

    def _latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        latent = self.bundle.manifest["latent"]
        scale = latent["scale_factor"]
        return latent["channels"], settings.height // scale, settings.width // scale

    def _batches(self, pictures: list[_Picture], settings: Settings) -> list[list[_Picture]]:
        _, height, width = self._latent_shape(settings)
        rows = 1 if settings.guidance_scale == 1 else 2
        size = max(1, _POSITIONS_A_CALL // (rows * height * width))
        return [pictures[start : start + size] for start in range(0, len(pictures), size)]

    # The loop

    def _denoise(
        self,
        pictures: list[_Picture],
        negative_prompt: str,
        settings: Settings,
        table: Table,
        report: Callable[[], None],
    ) -> Float32:
        """From noise to clean latents: float32[len(pictures), channels, height, width]; `report` follows each step."""
        # 1. What the UNet is conditioned by: without the prompt first, then with it
        context = np.stack([self._condition(picture.prompt) for picture in pictures])
        if settings.guidance_scale != 1:
            without = np.broadcast_to(self._condition(negative_prompt), context.shape)
            context = np.concatenate([without, context])

        # 2. Noise
        shape = self._latent_shape(settings)
        streams = [np.random.Generator(np.random.Philox(key=_philox_key(picture))) for picture in pictures]
        noise = _draw(streams, shape)
        start = [noise[i] if picture.latents is None else picture.latents for i, picture in enumerate(pictures)]
        x, x0 = np.stack(start) * np.float32(table.init_noise_sigma), None

        # 3. From noise to picture, step by step
        for step in range(len(table)):
            row = table[step]
            output = self._predict(x, row, context, np.float32(settings.guidance_scale))
            x, x0 = advance(row, x, output, x0, _draw(streams, shape) if row.next_from_noise else None)
            report()
        return x

    def _predict(self, x: Float32, row: Row, context: Float32, guidance_scale: np.float32) -> Float32:
        """The UNet's output for each sample, guided if `context` has two rows for each."""
        guided = len(context) > len(x)
        scaled = x * row.input_scale
        sample = np.concatenate([scaled, scaled]) if guided else scaled
        timestep = np.full(len(sample), row.timestep, np.float32)
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": context}
        output: Float32 = self.bundle.session("unet").run(["out_sample"], inputs)[0]
        if not guided:
            return output
        without, with_prompt = output[: len(x)], output[len(x) :]
        return without + guidance_scale * (with_prompt - without)

    def _decode(self, latents: Float32) -> list[Image.Image]:
        latent = self.bundle.manifest["latent"]
        scaled = latents / np.float32(latent["scaling_factor"]) + np.float32(latent["shift_factor"])
        decoded: Float32 = self.bundle.session("vae_decoder").run(["sample"], {"latent_sample": scaled})[0]
        if not np.isfinite(decoded).all():
            raise GenerationError(
                f"the {self.bundle.precision} bundle {self.bundle.path} drew something that is not finite; "
                "lower guidance_scale, or export it at a higher precision"
            )
        pixels = np.rint((decoded * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8)
        return [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]

    # Parts that load when they are first used

    def _encode_prompt(self, prompt: str) -> Float32:
        """The token states that condition the UNet: float32[prompt_tokens, width]."""
        encoding = self._tokenizer.encode(prompt)
        if encoding.overflowing:
            kept = self.bundle.prompt_tokens
            warnings.warn(f"the prompt is longer than {kept} tokens; the rest is ignored: {prompt!r}", stacklevel=2)
        ids = token_ids(self._tokenizer, [prompt])
        states: Float32 = self.bundle.session("text_encoder").run(["last_hidden_state"], {"input_ids": ids})[0][0]
        return states

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.bundle.path / "tokenizer", self.bundle.prompt_tokens)

    @cached_property
    def _schedule(self) -> Schedule:
        return self.bundle.schedule()

    @cached_property
    def _unet_downsampling(self) -> int:
        """By what the latents' sides must be divisible: each block of the UNet but the last halves them."""
        return int(2 ** (len(self.bundle.config("unet/config.json")["block_out_channels"]) - 1))


def _draw(streams: list[np.random.Generator], shape: tuple[int, int, int]) -> Float32:
    """The next standard normal noise of each stream: float32[len(streams), *shape]."""
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def _philox_key(picture: _Picture) -> NDArray[np.uint64]:
    return np.array([picture.seed, picture.index], np.uint64)


def _integer(name: str, value: Any, *, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise OptionError(f"{name} is {value!r}; give a whole number of at least {at_least}")
    return number
