from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.recorded import open_recorded, recorded
from support.toy_bundle import CHANNELS, IMAGE_SIZE, LATENT_SIZE, make_toy_bundle

from unidiff_sdk.errors import GenerationError, ImageError, OptionError
from unidiff_sdk.generation.generator import Generator, Preview
from unidiff_sdk.generation.options import GenerationOptions, ResolvedOptions
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture
def generator(folder: Path) -> Generator:
    return Generator(open_recorded(folder))


def batches(generator: Generator, graph: str) -> list[int]:
    """The batch size of each call of a graph so far."""
    return recorded(generator.bundle, graph).batches


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_failing_graph_raises_generation_error(generator: Generator) -> None:
    def fail(outputs: object) -> None:
        raise RuntimeError("Failed to allocate memory")

    recorded(generator.bundle, "vae_decoder").alter_outputs = fail  # type: ignore[assignment]
    with pytest.raises(GenerationError, match=r"a call of the vae_decoder failed \(Failed to allocate"):
        generator.generate("boots", steps=1)


def test_missing_negative_prompt_equals_an_empty_one(generator: Generator) -> None:
    same = [generator.generate("boots", guidance_scale=4, steps=2, negative_prompt=none) for none in (None, "")]
    np.testing.assert_array_equal(pixels(same[0]), pixels(same[1]))
    for wrong, message in ((7, "negative_prompt is 7; give a text"), ("\ud83d", "not valid Unicode")):
        with pytest.raises(OptionError, match=message):
            generator.generate("boots", negative_prompt=wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="not valid Unicode"):
        generator.generate("\ud83d")


def test_bundle_generator_and_encoder_are_freed_without_garbage_collection(folder: Path) -> None:
    bundle = Bundle.open(folder, threads=1)
    generator, encoder = Generator(bundle), Encoder(bundle)
    generator.generate("boots", steps=1)
    encoder.encode_text("boots")
    left = [weakref.ref(each) for each in (bundle, generator, encoder)]
    gc.disable()
    try:
        del bundle, generator, encoder
        assert [each() for each in left] == [None] * 3
    finally:
        gc.enable()


def test_generate_returns_images_in_the_order_of_prompts(generator: Generator) -> None:
    images = generator.generate(["red boots", "a blue coat"], n=3, seed=5)
    assert len(images) == 6
    assert all(image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in images)
    np.testing.assert_array_equal(pixels(images[:3]), pixels(generator.generate("red boots", n=3, seed=5)))
    np.testing.assert_array_equal(pixels(images[3:]), pixels(generator.generate("a blue coat", n=3, seed=5)))


def test_image_depends_on_seed_and_prompt(generator: Generator) -> None:
    first, second = pixels(generator.generate("red boots", n=2, seed=1))
    for other in (
        second,
        *pixels(generator.generate("red boots", seed=2)),
        *pixels(generator.generate("coat", seed=1)),
    ):
        assert np.abs(first - other).max() > 3
    largest = generator.generate("red boots", seed=2**63 - 1)
    assert len(largest) == 1


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "euler_a", "lcm"])
def test_batching_changes_no_pixel_by_more_than_one_level(generator: Generator, sampler: str) -> None:
    together = pixels(generator.generate(["coat", "red boots"], n=7, seed=3, sampler=sampler))[7:]
    alone = pixels(generator.generate("red boots", n=1, seed=3, sampler=sampler))
    threes = Generator(generator.bundle, positions=2 * 3 * LATENT_SIZE**2)
    in_threes = pixels(threes.generate("red boots", n=7, seed=3, sampler=sampler))
    assert np.abs(together[:1] - alone).max() <= 1
    assert np.abs(together - in_threes).max() <= 1


def test_sixteen_threads_receive_the_images_of_one(folder: Path) -> None:
    """With ONNX Runtime, and different samplers, steps, guidance and numbers of images at the same time."""
    generator = Generator(Bundle.open(folder, threads=1))
    samplers = ("ddim", "euler", "dpm++2m", "euler_a")
    calls: list[dict[str, Any]] = [
        {
            "n": 1 + k % 3,
            "seed": k,
            "steps": 2 + k % 5,
            "sampler": samplers[k % 4],
            "guidance_scale": (1, 3, 7.5)[k % 3],
        }
        for k in range(16)
    ]
    alone = [pixels(generator.generate("red boots", **call)) for call in calls]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda call: pixels(generator.generate("red boots", **call)), calls))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1
    separate = Generator(generator.bundle, positions=1)
    exact = [pixels(separate.generate("red boots", **call)) for call in calls]
    with ThreadPoolExecutor(16) as threads:
        again = list(threads.map(lambda call: pixels(separate.generate("red boots", **call)), calls))
    for one, other in zip(exact, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_large_requests_are_split_into_calls(generator: Generator) -> None:
    threes = Generator(generator.bundle, positions=2 * 3 * LATENT_SIZE**2)
    assert len(threes.generate("boots", n=7, steps=2)) == 7
    assert batches(generator, "unet") == [6, 6, 6, 6, 2, 2] and batches(generator, "vae_decoder") == [3, 3, 1]
    assert len(Generator(generator.bundle, positions=1).generate("boots", n=2, steps=1)) == 2
    assert batches(generator, "unet")[6:] == [2, 2]


def test_generation_without_guidance_halves_the_batch(generator: Generator) -> None:
    generator.generate("boots", n=2, steps=3, guidance_scale=1)
    assert batches(generator, "unet") == [2, 2, 2]
    generator.generate("boots", n=2, steps=3, guidance_scale=1.5)
    assert batches(generator, "unet")[3:] == [4, 4, 4]


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_guidance_scale_up_to_1_follows_the_prompt_without_guidance(generator: Generator, scale: float) -> None:
    """As diffusers does: turbo models ask for 0."""
    options: dict[str, Any] = {"seed": 4, "sampler": "ddim", "steps": 3}
    prompted = pixels(generator.generate("boots", guidance_scale=scale, **options))
    assert batches(generator, "unet") == [1, 1, 1]
    assert np.abs(prompted - pixels(generator.generate("coat", guidance_scale=scale, **options))).max() > 3
    np.testing.assert_array_equal(prompted, pixels(generator.generate("boots", guidance_scale=1, **options)))


def test_guidance_leads_from_the_negative_prompt_to_the_prompt(generator: Generator) -> None:
    options: dict[str, Any] = {"seed": 4, "sampler": "ddim", "steps": 3}
    plain = pixels(generator.generate("boots", guidance_scale=1, **options))
    # without + g * (with - without) is the prompt alone where both prompts are the same
    same = pixels(generator.generate("boots", negative_prompt="boots", guidance_scale=7, **options))
    assert np.abs(same - plain).max() <= 1
    assert np.abs(pixels(generator.generate("boots", guidance_scale=7, **options)) - plain).max() > 3


def test_prompt_is_encoded_once(generator: Generator) -> None:
    generator.generate(["boots", "coat"], n=3)
    generator.generate("coat", n=2, seed=9)
    assert batches(generator, "text_encoder") == [1, 1, 1]  # two prompts and the empty negative one


def test_generate_starts_from_given_latents(generator: Generator) -> None:
    latents = np.random.default_rng(0).standard_normal((2, CHANNELS, LATENT_SIZE, LATENT_SIZE), dtype=np.float32)
    before = latents.copy()
    pair = pixels(generator.generate("boots", n=2, latents=latents))
    np.testing.assert_array_equal(pixels(generator.generate("boots", latents=latents[1:], seed=8)), pair[1:])
    np.testing.assert_array_equal(latents, before)
    with pytest.raises(GenerationError, match=r"shape \[2, 4, 8, 8\]; this call needs \[3, 4, 8, 8\]"):
        generator.generate("boots", n=3, latents=latents)
    latents[0, 0, 0, 0] = np.nan
    with pytest.raises(GenerationError, match="latents holds values that are not finite"):
        generator.generate("boots", n=2, latents=latents)


def test_generate_supports_other_sizes(generator: Generator) -> None:
    assert generator.generate("boots", width=24, height=8)[0].size == (24, 8)
    assert generator.generate("boots", width=32, height=32)[0].size == (32, 32)


def test_callback_receives_progress_and_may_cancel(generator: Generator) -> None:
    generator = Generator(generator.bundle, positions=2 * LATENT_SIZE**2)
    seen: list[tuple[int, int]] = []
    generator.generate("boots", n=2, steps=2, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate("boots", n=2, steps=2, callback=stop)
    assert batches(generator, "unet")[4:] == [2]


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m"])
def test_last_preview_is_the_result(generator: Generator, sampler: str) -> None:
    """For samplers whose last step goes to the estimate of the clean latents."""
    seen: list[tuple[int, int]] = []
    shown: list[list[Image.Image]] = []

    def on_preview(preview: Preview) -> None:
        seen.append((preview.done, preview.total))
        shown.append(preview.images())

    images = generator.generate("boots", n=2, seed=1, steps=3, sampler=sampler, preview=on_preview)
    assert seen == [(2, 6), (4, 6), (6, 6)]
    assert all([image.size for image in pair] == [(IMAGE_SIZE, IMAGE_SIZE)] * 2 for pair in shown)
    assert np.abs(pixels(shown[-1]) - pixels(images)).max() <= 1
    assert np.abs(pixels(shown[0]) - pixels(images)).max() > 1


def test_exception_from_preview_ends_the_generation(generator: Generator) -> None:

    def stop(preview: Preview) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate("boots", steps=5, preview=stop)
    assert batches(generator, "unet") == [2] and batches(generator, "vae_decoder") == []


def test_generation_beyond_the_available_memory_is_refused(folder: Path) -> None:
    generator = Generator(open_recorded(folder), available_memory=lambda: 3 * 2**20)
    assert len(generator.generate("boots", steps=1)) == 1
    with pytest.raises(
        GenerationError,
        match=r"^1 image of 1024 x 512 pixels needs about 128\.1 GiB of memory, but only 3 MiB is available; choose",
    ):
        generator.generate("boots", width=1024, height=512)
    assert batches(generator, "unet") == [2]


def test_mask_that_is_unreadable_or_dark_is_refused(generator: Generator) -> None:
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    with pytest.raises(ImageError, match=r"the mask cannot be used: .*not an image"):
        generator.generate("boots", like=image, mask=b"no image")
    with pytest.raises(OptionError, match="the mask is dark everywhere"):
        generator.generate("boots", like=image, mask=image)


@pytest.mark.parametrize("hidden", [(0, 0, 0, 0), (255, 255, 255, 0)])
@pytest.mark.parametrize("kind", ["image", "file", "array"])
def test_transparent_part_of_a_mask_is_kept(
    generator: Generator, tmp_path: Path, hidden: tuple[int, ...], kind: str
) -> None:
    source = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "red")
    mask = Image.new("RGBA", source.size, hidden)
    mask.paste((255, 255, 255, 255), (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    mask.save(tmp_path / "mask.png")
    given: Any = {"image": mask, "file": tmp_path / "mask.png", "array": np.asarray(mask)}[kind]
    (image,) = generator.generate("boots", like=source, mask=given, steps=2)
    kept = pixels([image])[0][:, IMAGE_SIZE // 2 :]
    assert (kept == (255, 0, 0)).all()
    assert (pixels([image])[0][:, : IMAGE_SIZE // 2] != (255, 0, 0)).any()
    with pytest.raises(OptionError, match="the mask is dark everywhere"):
        generator.generate("boots", like=source, mask=Image.new("RGBA", source.size, hidden))


def test_resolve_fills_in_the_defaults_of_the_bundle(generator: Generator) -> None:
    bundle = {"steps": 4, "guidance_scale": 3.0, "sampler": "ddim", "width": IMAGE_SIZE, "height": IMAGE_SIZE}
    assert generator.resolve(GenerationOptions(seed=1)) == ResolvedOptions(seed=1, **bundle)
    given: dict[str, Any] = {"steps": 9, "guidance_scale": 1, "sampler": "euler", "width": 8, "height": 16, "seed": 1}
    resolved = generator.resolve(GenerationOptions(**given))
    assert resolved == ResolvedOptions(**given) and generator.resolve(resolved) is resolved
    assert generator.resolve(GenerationOptions()).seed != generator.resolve(GenerationOptions()).seed
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    assert [
        generator.resolve(GenerationOptions(**sources)).strength
        for sources in ({}, {"like": image}, {"like": image, "mask": image}, {"like": image, "strength": 0.4})
    ] == [None, 0.7, 1.0, 0.4]


def test_run_refuses_to_select(generator: Generator) -> None:
    with pytest.raises(OptionError, match=r"best_of, .* select images; use Catalog.generate"):
        generator.run("boots", GenerationOptions(best_of=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; give an integer of at least 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": 1001}, "supports 1 to 1000"),
        ({"n": 0}, "n is 0"),
        ({"n": "2"}, "n is '2'"),
        ({"seed": -1}, "seed is -1; give an integer of at least 0"),
        ({"seed": 2**63}, "give at most 9223372036854775807"),
        ({"seed": 2**63 - 1, "n": 2}, "and 2 images may use the seeds from it on; give at most 9223372036854775806"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; give a number from 0 to 50"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": 51}, "guidance_scale is 51"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"sampler": "ddpm"}, "sampler is 'ddpm'; use one of ddim, euler"),
        ({"width": 10}, "width is 10; give a multiple of 4 pixels, such as 8 or 12"),
        ({"height": 0}, "height is 0; give a multiple of 4 pixels, such as 4 or 8"),
        ({"height": -8}, "height is -8; give a multiple of 4 pixels, such as 4 or 8"),
        ({"width": "64x64"}, "width is '64x64'"),
        ({"width": 16.0}, "width is 16.0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; give a number from 0 to 1"),
        ({"strength": 0.5}, "give that image as like="),
        ({"mask": "m.png"}, "give that image as like="),
        ({"long_prompts": "drop"}, "long_prompts is 'drop'; use one of truncate, chunk"),
        ({"negative_prompt": "blurry", "guidance_scale": 1}, "negative_prompt has no effect at guidance_scale 1"),
        ({"negative_prompt": "blurry", "guidance_scale": 0}, "no effect at guidance_scale 0; give a scale above 1"),
    ],
)
def test_invalid_options_are_refused_before_the_unet_runs(
    generator: Generator, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        generator.generate("boots", **options)
    assert batches(generator, "unet") == []


def test_prompts_must_be_strings(generator: Generator) -> None:
    for prompts in ([3], [None], 3, None):
        with pytest.raises(OptionError, match=r"prompt is .*; give a text, or a list of texts"):
            generator.generate(prompts)  # type: ignore[arg-type]
    assert generator.generate([]) == []


def test_truncated_prompt_warns(generator: Generator) -> None:
    with pytest.warns(UserWarning, match="longer than 12 tokens, so its end is ignored") as warned:
        generator.generate("boots with laces")
    assert not any("laces" in str(each.message) for each in warned)  # a server's log holds no prompts


def test_prompt_with_too_many_windows_is_refused(generator: Generator) -> None:
    assert len(generator.generate("boots with laces and more " * 3, steps=1, long_prompts="chunk")) == 1
    with pytest.raises(OptionError, match=r"takes \d+ windows of 12 tokens; give one of at most 8 windows"):
        generator.generate("boots with laces " * 30, long_prompts="chunk")


@pytest.mark.parametrize("graph", ["unet", "vae_decoder"])
def test_result_that_is_not_finite_raises(generator: Generator, graph: str) -> None:
    recorded(generator.bundle, graph).alter_outputs = lambda outputs: {
        name: np.full_like(array, np.nan) for name, array in outputs.items()
    }
    # an 8-bit decoder makes an image of codes, whatever they were made of
    recorded(generator.bundle, "vae_decoder").alter_feeds = lambda feeds: {
        name: np.nan_to_num(array) for name, array in feeds.items()
    }
    with pytest.raises(GenerationError, match=r"fp32 bundle .* not finite; lower guidance_scale"):
        generator.generate("boots")
