"""The runtime with an exported bundle against transformers and diffusers with the checkpoint that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.batching import batch_differences
from support.edited_images import SCHEDULERS, edited_by_diffusers

from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder

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
    np.testing.assert_array_equal(encoder.tokenize(TEXTS), ids.numpy())

    clip = CLIPModel.from_pretrained(random_checkpoint / "clip").eval()
    processor = CLIPImageProcessorPil.from_pretrained(random_checkpoint / "clip")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = clip(input_ids=ids, **processor(image, return_tensors="pt"))
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected.text_embeds.numpy(), atol=2e-5)
    np.testing.assert_allclose(encoder.encode_images([image]), expected.image_embeds.numpy(), atol=2e-5)


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
def test_images_equal_diffusers(
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


def test_guidance_rescale_equals_diffusers(bundle: Bundle, pipeline: Any) -> None:
    import diffusers

    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 16), dtype=np.float32)
    options: dict[str, Any] = {"guidance_scale": 9.0, "guidance_rescale": 0.7}
    expected = pipeline("a red dress", latents=torch.from_numpy(latents), num_inference_steps=5, **options).images[0]
    image = Generator(bundle).generate("a red dress", latents=latents, steps=5, sampler="ddim", **options)[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


SOURCE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((32, 32))


@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name != "flow_euler"])  # another prediction type
@pytest.mark.parametrize("strength", [0.3, 0.72, 1.0])
def test_image_to_image_equals_diffusers(
    bundle: Bundle, pipeline: Any, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"image": SOURCE, "strength": strength, "num_inference_steps": 7}
    expected = edited_by_diffusers("Img2Img", pipeline, sampler, 5, monkeypatch, **options)
    ours = Generator(bundle).generate(
        "green dotted boots",
        negative_prompt="blurry",
        guidance_scale=3.0,
        steps=7,
        sampler=sampler,
        seed=5,
        like=SOURCE,
        strength=strength,
    )[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize("strength", [0.72, 1.0])
def test_inpainting_equals_diffusers_inside_the_mask(
    bundle: Bundle, pipeline: Any, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    repaint = np.zeros((32, 32), np.uint8)
    repaint[8:24, 4:20] = 255
    mask = Image.fromarray(repaint)
    options = {"image": SOURCE, "mask_image": mask, "strength": strength, "num_inference_steps": 7}
    expected = edited_by_diffusers("Inpaint", pipeline, sampler, 5, monkeypatch, height=32, width=32, **options)
    ours = Generator(bundle).generate(
        "green dotted boots",
        negative_prompt="blurry",
        guidance_scale=3.0,
        steps=7,
        sampler=sampler,
        seed=5,
        like=SOURCE,
        mask=mask,
        strength=strength,
    )[0]
    inside = repaint > 0
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected))[inside].max() <= 1
    np.testing.assert_array_equal(np.asarray(ours)[~inside], np.asarray(SOURCE)[~inside])


def test_long_prompts_in_windows_equal_transformers(bundle: Bundle, random_checkpoint: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    from unidiff_sdk.generation.conditioning import Conditioner

    prompt = "a red striped dress with short sleeves and green dotted boots on white, long sleeves"
    tokenizer = CLIPTokenizer.from_pretrained(random_checkpoint / "tokenizer")
    words = tokenizer(prompt, add_special_tokens=False).input_ids
    room = tokenizer.model_max_length - 2
    windows = [words[i : i + room] for i in range(0, len(words), room)]
    assert len(windows) > 1
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [[start, *window, end] + [pad] * (room - len(window)) for window in windows]
    encoder = CLIPTextModel.from_pretrained(random_checkpoint / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(torch.tensor(ids)).last_hidden_state.numpy()
    states = Conditioner(bundle).conditions(prompt, "chunk")["encoder_hidden_states"]
    np.testing.assert_allclose(states, expected.reshape(-1, states.shape[-1]), atol=2e-5)


def test_batching_changes_no_pixel_by_more_than_one_level(bundle: Bundle) -> None:
    shared, own = batch_differences(bundle)
    assert shared <= 1 and own == 0
