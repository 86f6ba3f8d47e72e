"""Stable Diffusion 3.5: the bundle generates the images of diffusers' pipelines, from the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from safetensors.torch import save_file
from support.batching import batch_differences
from support.edited_images import SOURCE, edited, edited_by_diffusers
from support.pipeline_folders import change_json, serve_from_hub
from support.random_sd3 import JOINT, LARGEST_SIDE, make_random_sd3
from support.random_sdxl import POOLED
from support.toy_bundle import seal

from unidiff_export import export_bundle
from unidiff_export.graphs.lowering import graph_specs
from unidiff_export.verification import psnr_db
from unidiff_sdk import Catalog
from unidiff_sdk.errors import BundleError, CheckpointError, OptionError
from unidiff_sdk.generation.conditioning import Conditioner
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.folder.diffusers_folder import sampler_defaults
from unidiff_sdk.inference.manifest import JointConditioning, SamplerDefaults
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions

PROMPTS = ["a red striped dress", "green dotted boots"]
CAPTIONS = [*PROMPTS, "a plain teal mug", "a purple coat"]
LONG = "a red striped dress with short sleeves and green dotted boots on white, long sleeves"
TOKENS, ZEROS, CLIP_WIDTH = 16, 256, 32 + 48  # of CLIP, of the missing T5; width of the states of both towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_random_sd3(tmp_path_factory.mktemp("checkpoint") / "sd3")
    change_json("unidiff.json", captions=CAPTIONS)(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(export_bundle(folder, tmp_path_factory.mktemp("export") / "bundle").path, threads=1)


@pytest.fixture
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_bundle_describes_the_transformer(bundle: Bundle) -> None:
    manifest, graphs = bundle.manifest, bundle.manifest.graphs
    expected = JointConditioning(("hidden_states.1", "hidden_states.2"), JOINT, ZEROS, 32 + POOLED)
    assert (manifest.joint_conditioning, manifest.conditioning) == (expected, None)
    assert list(graphs) == [
        *("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder", "image_encoder")
    ]
    assert list(graphs["transformer"].inputs) == [
        *("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")  # the names of optimum
    ]
    assert graphs["transformer"].profile["encoder_hidden_states"]["opt"] == [2, TOKENS + ZEROS, JOINT]
    assert graphs["transformer"].attention_nodes == 3 + 2  # joint attention in each layer, and twice another
    assert manifest.embedding.shared_text_encoder
    assert (manifest.latent.channels, manifest.latent.scaling_factor) == (16, 1.5305)
    assert manifest.latent.shift_factor == 0.0609
    assert manifest.sampler == SamplerDefaults("flow_euler", 4, 4.5, "flow")  # 4 steps, as unidiff.json states
    scheduler = bundle.config("scheduler/scheduler_config.json")
    assert sampler_defaults(scheduler) == {"name": "flow_euler", "steps": 28, "guidance_scale": 4.5}
    index = bundle.config("model_index.json")
    assert (index["_class_name"], index["text_encoder_3"]) == ("StableDiffusion3Pipeline", [None, None])
    assert len(bundle.warmup()) == len(graphs)  # every graph accepts its usual shapes
    assert bundle.manifest.parity["image"]["psnr_db"] >= 45


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 5.0},  # without a negative prompt: the states of an empty one
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": "blurry"},
        {"guidance_scale": 5.0, "width": LARGEST_SIDE, "height": 20},  # other positions than the trained ones
    ],
)
def test_images_equal_diffusers(bundle: Bundle, pipeline: Any, options: dict[str, Any]) -> None:
    height, width = options.get("height", 32) // 2, options.get("width", 32) // 2
    latents = np.random.default_rng(1).standard_normal((2, 16, height, width), dtype=np.float32)
    ours = Generator(bundle).generate(PROMPTS, latents=latents, steps=4, **options)
    if negative_prompt := options.get("negative_prompt"):
        options = options | {"negative_prompt": [negative_prompt] * 2}
    theirs = pipeline(PROMPTS, latents=torch.from_numpy(latents), num_inference_steps=4, **options).images
    for image, expected in zip(ours, theirs, strict=True):
        assert psnr_db(np.asarray(image), np.asarray(expected)) > 50


def test_conditions_equal_diffusers(bundle: Bundle, pipeline: Any) -> None:
    """Padded with zeros to the width of T5, and followed by zeros for its states."""
    conditioner = Conditioner(bundle)
    prompted, negative = conditioner.pair(PROMPTS[0], "blurry", "truncate")
    with torch.no_grad():
        states, negative_states, pooled, negative_pooled = pipeline.encode_prompt(
            PROMPTS[0], None, None, negative_prompt="blurry"
        )
    for ours, expected, expected_pooled in ((prompted, states, pooled), (negative, negative_states, negative_pooled)):
        completed = conditioner.completed(ours, 32, 32)
        assert completed["encoder_hidden_states"].shape == (TOKENS + ZEROS, JOINT)
        np.testing.assert_allclose(completed["encoder_hidden_states"], expected[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(completed["pooled_projections"], expected_pooled[0].numpy(), atol=2e-5)


def test_long_prompts_in_windows_come_before_the_zeros(bundle: Bundle) -> None:
    conditioner = Conditioner(bundle)
    prompted, negative = conditioner.pair(LONG, "", "chunk")
    windows = len(prompted["encoder_hidden_states"]) // TOKENS
    assert windows > 1 and prompted["encoder_hidden_states"].shape == negative["encoder_hidden_states"].shape
    empty = conditioner.conditions("")["encoder_hidden_states"]
    np.testing.assert_array_equal(negative["encoder_hidden_states"], np.concatenate([empty] * windows))
    completed = conditioner.completed(prompted, 32, 32)["encoder_hidden_states"]
    assert completed.shape == (windows * TOKENS + ZEROS, JOINT)
    assert not completed[:, CLIP_WIDTH:].any() and not completed[-ZEROS:].any()
    (image,) = Generator(bundle).generate(LONG, steps=1, long_prompts="chunk")
    assert image.size == (32, 32)


@pytest.mark.parametrize("strength", [0.6, 1.0])  # of 5 steps, where diffusers rounds as we do
def test_image_to_image_equals_diffusers(
    bundle: Bundle, pipeline: Any, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"image": SOURCE, "strength": strength, "num_inference_steps": 5}
    expected = edited_by_diffusers("Img2Img", pipeline, "flow_euler", 5, monkeypatch, **options)
    assert psnr_db(edited(bundle, "flow_euler", strength), np.asarray(expected)) > 50


def test_inpainting_equals_diffusers_inside_the_mask(
    bundle: Bundle, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers 0.42 forgets the shift of the VAE when it decodes this result, so its latents are decoded here."""
    repaint = np.zeros((32, 32), np.uint8)
    repaint[8:24, 4:20] = 255
    mask = Image.fromarray(repaint)
    options = {"image": SOURCE, "mask_image": mask, "strength": 0.6, "num_inference_steps": 5}
    options |= {"height": 32, "width": 32, "output_type": "latent"}
    latents = edited_by_diffusers("Inpaint", pipeline, "flow_euler", 5, monkeypatch, **options)[None]
    vae = pipeline.vae
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = np.asarray(pipeline.image_processor.postprocess(pixels)[0])
    ours, inside = edited(bundle, "flow_euler", 0.6, mask=mask), repaint > 0
    assert psnr_db(ours[inside], expected[inside]) > 50
    np.testing.assert_array_equal(ours[~inside], np.asarray(SOURCE)[~inside])


def test_previews_show_the_estimates(bundle: Bundle) -> None:
    seen: list[Image.Image] = []
    (image,) = Generator(bundle).generate(PROMPTS[0], steps=3, preview=lambda shown: seen.extend(shown.images()))
    assert len(seen) == 3
    np.testing.assert_array_equal(np.asarray(seen[-1]), np.asarray(image))  # the last step returns its estimate


def test_batching_changes_no_pixel_by_more_than_one_level(bundle: Bundle) -> None:
    shared, own = batch_differences(bundle)
    assert shared <= 1 and own == 0


def test_requests_at_different_steps_share_calls(bundle: Bundle) -> None:
    """Whether generated alone or at the same time as others, with other numbers of steps and guidance."""
    generator = Generator(bundle, positions=1)  # each call has one image, and any order of the calls the same pixels
    shared = Generator(bundle)
    calls: list[dict[str, Any]] = [
        {"seed": k, "steps": 2 + k % 4, "guidance_scale": (1, 5.0)[k % 2], "n": 1 + k % 2} for k in range(6)
    ]
    alone = [pixels(generator.generate(PROMPTS[0], **call)) for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        exact = list(threads.map(lambda call: pixels(generator.generate(PROMPTS[0], **call)), calls))
        together = list(threads.map(lambda call: pixels(shared.generate(PROMPTS[0], **call)), calls))
    for one, same, other in zip(alone, exact, together, strict=True):
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).max() <= 1


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.int64) for image in images])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": LARGEST_SIDE + 4}, f"width is {LARGEST_SIDE + 4}; this model has positions for at most"),
        ({"height": 30}, "height is 30; give a multiple of 4 pixels, such as 28 or 32"),
        ({"sampler": "euler"}, "'euler', which is for other models than flow matching models; use one of flow_euler"),
        ({"steps": 1001}, "supports 1 to 1000"),
    ],
)
def test_sizes_and_samplers_of_other_models_are_refused(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Generator(bundle).generate(PROMPTS[0], **options)


@pytest.mark.filterwarnings("ignore:rerank= uses general defaults")
def test_catalog_searches_reranks_and_selects(bundle: Bundle, small_catalog: Path) -> None:
    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add_folder(small_catalog)
        assert len(catalog.search("a red dress", limit=4, rerank=3)) == 4
        images = catalog.generate("a red dress", n=2, best_of=3, steps=2, seed=1)
        assert images.generated == 3 and images[0].score >= images[1].score


def test_search_has_its_own_tower_if_clip_is_another(folder: Path, random_checkpoint: Path) -> None:
    pipeline = load_base(folder, random_checkpoint / "clip")
    specs = {spec.name: spec for spec in graph_specs(pipeline)}
    assert not pipeline.shared and specs["clip_text_encoder"].outputs == ("text_embeds",)
    assert specs["text_encoder"].outputs == ("text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1")


def test_search_has_its_own_tower_if_only_the_projection_differs(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    clip = Path(shutil.copytree(folder / "clip", tmp_path / "clip"))
    model = CLIPModel.from_pretrained(clip)
    model.text_projection.weight.data *= 2
    model.save_pretrained(clip)
    assert load_base(folder, folder / "clip").shared and not load_base(folder, clip).shared


# --- with a third text encoder ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a T5."""
    return make_random_sd3(tmp_path_factory.mktemp("checkpoint") / "sd3", third=True)


@pytest.fixture(scope="module")
def whole_bundle(whole_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = tmp_path_factory.mktemp("export") / "bundle"
    return Bundle.open(export_bundle(whole_folder, bundle).path, threads=1)


@pytest.fixture
def whole_pipeline(whole_folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(whole_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow  # the export of a second pipeline
@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a purple boat, blurry"}, {"guidance_scale": 1.0}])
def test_images_with_a_third_text_encoder_equal_diffusers(
    whole_bundle: Bundle, whole_pipeline: Any, options: dict[str, Any]
) -> None:
    options = {"guidance_scale": 5.0} | options
    assert whole_bundle.manifest.graphs["text_encoder_3"].attention_nodes == 2
    latents = np.random.default_rng(1).standard_normal((2, 16, 16, 16), dtype=np.float32)
    ours = Generator(whole_bundle).generate(PROMPTS, latents=latents, steps=4, **options)
    if negative_prompt := options.get("negative_prompt"):
        options = options | {"negative_prompt": [negative_prompt] * 2}
    theirs = whole_pipeline(PROMPTS, latents=torch.from_numpy(latents), num_inference_steps=4, **options).images
    for image, expected in zip(ours, theirs, strict=True):
        assert psnr_db(np.asarray(image), np.asarray(expected)) > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt is longer than 16 tokens")
@pytest.mark.parametrize("prompt", [PROMPTS[0], "", "dress " * 300])
def test_states_of_a_third_text_encoder_equal_diffusers(whole_bundle: Bundle, whole_pipeline: Any, prompt: str) -> None:
    conditioner = Conditioner(whole_bundle)
    if len(prompt) > 1000:
        with pytest.warns(UserWarning, match="longer than the 256 tokens of the third text encoder"):
            conditioner.conditions(prompt)
    completed = conditioner.completed(conditioner.conditions(prompt), 32, 32)
    with torch.no_grad():
        states, _, pooled, _ = whole_pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    assert list(completed) == ["encoder_hidden_states", "pooled_projections"]
    np.testing.assert_allclose(completed["encoder_hidden_states"], states[0].numpy(), atol=5e-5)
    np.testing.assert_allclose(completed["pooled_projections"], pooled[0].numpy(), atol=2e-5)


def test_all_parts_are_downloaded_from_the_hub(
    whole_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_from_hub(whole_folder, tmp_path, monkeypatch)
    checkpoint = load_base("hf:some/sd3", whole_folder / "clip")
    assert checkpoint.is_transformer and checkpoint.second and checkpoint.third and checkpoint.shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "tokenizer_3"), "Missing: tokenizer_3/tokenizer.json"),
        (lambda folder: change_json("text_encoder_3/config.json", d_model=64)(folder), "text_encoder_3/ returns 64"),
        (lambda folder: change_json("text_encoder_3/config.json", model_type="umt5")(folder), "only t5 can be loaded"),
        (
            lambda folder: change_json("text_encoder_3/config.json", vocab_size=8)(folder),
            "Cannot read .*text_encoder_3",
        ),
    ],
)
def test_other_third_text_encoders_are_refused(
    whole_folder: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    copy = Path(shutil.copytree(whole_folder, tmp_path / "sd3"))
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        load_base(copy)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [("tensorrt", "fp16"), ("cuda", "fp32"), ("cpu", "int8")])
def test_targets_and_precisions_with_a_third_text_encoder(
    whole_folder: Path, tmp_path: Path, target: str, precision: str
) -> None:
    folder = Path(shutil.copytree(whole_folder, tmp_path / "sd3"))
    change_json("unidiff.json", captions=CAPTIONS)(folder)
    export = export_bundle(folder, tmp_path / "bundle", target=target, precision=precision)
    assert {graph.name: graph.precision for graph in export.graphs}["text_encoder_3"] == precision


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_json("model_index.json", _class_name="StableDiffusion3ControlNetPipeline"), "ControlNetPipeline"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), r"Missing: text_encoder_2/config.json"),
        (lambda folder: (folder / "text_encoder_3").mkdir(), r"Missing: text_encoder_3/config.json .*, tokenizer_3/"),
        (change_json("transformer/config.json", _class_name="FluxTransformer2DModel"), "only SD3Transformer2DModel"),
        (change_json("transformer/config.json", in_channels=32), "takes 32 channels and returns 16, but the VAE has"),
        (change_json("transformer/config.json", joint_attention_dim=64), "width 64, .* return 32 and 48"),
        (change_json("transformer/config.json", pooled_projection_dim=60), "width 60, .* return 32 and 24"),
        (change_json("transformer/config.json", caption_projection_dim=64), "is 64, but it has 4 heads of width 8"),
        (change_json("transformer/config.json", pos_embed_max_size=None), "pos_embed_max_size is None"),
        (change_json("transformer/config.json", sample_size=26), "into at most 12 patches"),
        (change_json("vae/config.json", shift_factor=None), "shift_factor of the VAE is None"),
        (change_json("vae/config.json", latents_mean=[0.0] * 16), "the VAE states latents_mean"),
        (change_json("text_encoder_2/config.json", max_position_embeddings=77), "text_encoder_2/ has 77"),
        (change_json("tokenizer_2/tokenizer_config.json", model_max_length=77), "tokenizer_2: model_max_length is 77"),
        (change_json("scheduler/scheduler_config.json", use_dynamic_shifting=True), "use_dynamic_shifting True"),
        (change_json("scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler"), "'EulerDiscreteSchedul"),
        (change_json("scheduler/scheduler_config.json", shift="3"), "shift is '3'"),
    ],
)
def test_other_pipelines_are_refused(folder: Path, tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "sd3"))
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        load_base(copy)


def test_a_third_text_encoder_that_is_not_there_is_named_in_a_warning(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "sd3"))
    change_json("model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])(copy)
    with pytest.warns(UserWarning, match="has no text_encoder_3/, .* Zeros stand for its states"):
        load_base(copy)


def test_flow_matching_does_not_fit_other_models(random_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(random_checkpoint, tmp_path / "sd1"))
    change_json("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")(copy)
    with pytest.raises(CheckpointError, match="made for flow matching models"):
        load_base(copy)


def test_textual_inversions_are_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"<shoe>": torch.zeros(1, 32)}, file)
    with pytest.raises(CheckpointError, match="Textual inversions are not supported for Stable Diffusion 3"):
        load_base(folder, None, BaseOptions.of(textual_inversion=[file]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": ["hidden_states.1", "hidden_states.9"]}, "text_encoder_2 has the outputs .*, but the runtime uses"),
        ({"pooled_width": POOLED}, f"pooled_projections float32.*, but the model has .*{POOLED}"),
        ({"width": CLIP_WIDTH - 1}, "encoder_hidden_states float32"),
        ({"third_tokens": 0}, r"joint_conditioning\.third_tokens is 0"),
        (None, "the graph transformer and the section joint_conditioning belong together"),
    ],
)
def test_graphs_that_do_not_fit_the_manifest_are_refused(
    bundle: Bundle, tmp_path: Path, changes: dict[str, Any] | None, message: str
) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    conditioning = manifest.pop("joint_conditioning")
    if changes is not None:
        manifest["joint_conditioning"] = conditioning | changes
    seal(copy, manifest)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("name", "value"), [("patch_size", None), ("pos_embed_max_size", "many"), ("num_attention_heads", 0)]
)
def test_damaged_configuration_is_refused(bundle: Bundle, tmp_path: Path, name: str, value: Any) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    change_json("transformer/config.json", **{name: value})(copy)
    with pytest.raises(BundleError, match=rf"transformer/config.json: {name} is {value!r}; it must be an integer"):
        Generator(Bundle.open(copy, verify=False)).generate(PROMPTS[0], width=32)


# --- other targets and precisions ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dual_attention", [True, False])
@pytest.mark.parametrize(
    ("target", "precision", "least"),
    [("portable", "fp32", 50), ("tensorrt", "fp16", 35), ("cuda", "fp16", 35), ("cpu", "int8", 25)],
)
def test_targets_and_precisions_are_verified(
    tmp_path: Path, target: str, precision: str, least: float, dual_attention: bool
) -> None:
    folder = make_random_sd3(tmp_path / "sd3", dual_attention=dual_attention)
    change_json("unidiff.json", captions=CAPTIONS)(folder)
    export = export_bundle(folder, tmp_path / "bundle", target=target, precision=precision)
    assert export.image is not None and export.image.psnr_db >= least
    precisions = {graph.name: graph.precision for graph in export.graphs}
    assert precisions["transformer"] == precisions["text_encoder_2"] == precision
