"""The runtime on a really exported bundle against transformers and diffusers on the checkpoint that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk.bundle import Bundle
from unidiff_sdk.encoder import Encoder
from unidiff_sdk.generator import Generator

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

TEXTS = ["a red dress", "", "Ünïcode — 日本 & <b>tags</b>", "don't   SHOUT", "long " * 30, "🙂 12.5% <|endoftext|> x"]


@pytest.fixture(scope="module")
def bundle(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from unidiff_export import export_bundle

    return Bundle.open(export_bundle(random_checkpoint, tmp_path_factory.mktemp("export") / "bundle").path, threads=1)


def test_encoder_equals_transformers(bundle: Bundle, random_checkpoint: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    encoder = Encoder(bundle)
    tokenizer = CLIPTokenizer.from_pretrained(random_checkpoint / "tokenizer")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    np.testing.assert_array_equal(encoder.tokenise(TEXTS), ids.numpy())

    clip = CLIPModel.from_pretrained(random_checkpoint / "clip").eval()
    processor = CLIPImageProcessorPil.from_pretrained(random_checkpoint / "clip")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = clip(input_ids=ids, **processor(picture, return_tensors="pt"))
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected.text_embeds.numpy(), atol=2e-5)
    np.testing.assert_allclose(encoder.encode_images([picture]), expected.image_embeds.numpy(), atol=2e-5)


@pytest.fixture(scope="module")
def pipeline(random_checkpoint: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint, safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("sampler", "guidance_scale", "negative_prompt"),
    [("ddim", 5.0, ""), ("euler", 1.0, ""), ("dpm++2m", 3.0, "blurry")],
)
def test_pictures_equal_diffusers(
    bundle: Bundle, pipeline: Any, sampler: str, guidance_scale: float, negative_prompt: str
) -> None:
    import diffusers

    schedulers = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    }
    pipeline.scheduler = schedulers[sampler].from_config(pipeline.scheduler.config)
    latents = np.random.default_rng(1).standard_normal((2, 4, 16, 16), dtype=np.float32)
    prompts = ["a red striped dress", "green dotted boots"]
    expected = pipeline(
        prompts,
        negative_prompt=[negative_prompt] * 2,
        latents=torch.from_numpy(latents),
        num_inference_steps=5,
        guidance_scale=guidance_scale,
    ).images
    images = Generator(bundle).generate(
        prompts,
        negative_prompt=negative_prompt,
        latents=latents,
        steps=5,
        guidance_scale=guidance_scale,
        sampler=sampler,
    )
    for ours, theirs in zip(images, expected, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def test_a_picture_is_the_same_whatever_it_is_drawn_beside(bundle: Bundle) -> None:
    generator = Generator(bundle)
    together = generator.generate(["coat", "red boots"], n=9, seed=3, steps=3)[9:]
    for k, picture in enumerate(generator.generate("red boots", n=2, seed=3, steps=3)):
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(together[k])).max() <= 1
