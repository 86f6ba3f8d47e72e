"""Stable Diffusion XL: the bundle generates the images of diffusers' pipelines, from the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from support.batching import batch_differences
from support.edited_images import SCHEDULERS, SOURCE, edited, edited_by_diffusers
from support.lora_files import make_lora
from support.pipeline_folders import change_json, serve_from_hub
from support.random_sdxl import LARGER, POOLED, SIZE_WIDTH, make_random_sdxl
from support.toy_bundle import seal

from unidiff_export import export_bundle
from unidiff_export.bundle.files import write_pipeline_files
from unidiff_export.bundle.manifest import describe_model
from unidiff_export.graphs.lowering import graph_specs
from unidiff_export.pipeline import generate_images, load_pipeline
from unidiff_export.verification import psnr_db
from unidiff_sdk import Catalog
from unidiff_sdk.errors import BundleError, CheckpointError
from unidiff_sdk.generation.conditioning import Conditioner
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import Conditioning, SamplerDefaults
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions

PROMPTS = ["a red striped dress", "green dotted boots"]
LONG = "a red striped dress with short sleeves and green dotted boots on white, long sleeves"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_random_sdxl(tmp_path_factory.mktemp("checkpoint") / "xl")
    captions = [*PROMPTS, "a plain teal mug", "a purple coat"]
    (folder / "unidiff.json").write_text(json.dumps({"captions": captions}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(export_bundle(folder, tmp_path_factory.mktemp("export") / "bundle").path, threads=1)


@pytest.fixture
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_bundle_describes_both_text_encoders(bundle: Bundle) -> None:
    manifest, graphs = bundle.manifest, bundle.manifest.graphs
    assert manifest.conditioning == Conditioning(("hidden_states.1", "hidden_states.2"), POOLED, zero_negative=True)
    assert list(graphs) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "image_encoder"]
    assert list(graphs["text_encoder_2"].outputs)[:2] == ["text_embeds", "last_hidden_state"]
    assert graphs["unet"].inputs["time_ids"].shape[1] == 6
    assert graphs["unet"].profile and graphs["unet"].profile["text_embeds"]["opt"] == [2, POOLED]
    embedding = manifest.embedding
    assert embedding and (embedding.shared_text_encoder, embedding.conditioning_layer) == (True, None)
    assert manifest.latent.scaling_factor == 0.13025
    index = bundle.config("model_index.json")
    assert (index["_class_name"], index["force_zeros_for_empty_prompt"]) == ("StableDiffusionXLPipeline", True)
    assert len(bundle.warmup()) == len(graphs)  # every graph accepts its usual shapes


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("euler", {"guidance_scale": 5.0}),  # without a negative prompt: zeros
        ("euler", {"guidance_scale": 1.0}),
        ("dpm++2m", {"guidance_scale": 3.0, "negative_prompt": "blurry"}),
        ("ddim", {"guidance_scale": 9.0, "guidance_rescale": 0.7}),
        ("euler", {"guidance_scale": 5.0, "width": 48, "height": 32}),
        ("euler", {"guidance_scale": 5.0, "width": 24, "height": 40, "negative_prompt": "blurry"}),
    ],
)
def test_images_equal_diffusers(bundle: Bundle, pipeline: Any, sampler: str, options: dict[str, Any]) -> None:
    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[sampler])
    unclipped = {"clip_sample": False} if sampler == "ddim" else {}
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **unclipped)
    shape = (2, 4, options.get("height", 32) // 2, options.get("width", 32) // 2)
    latents = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    ours = Generator(bundle).generate(PROMPTS, latents=latents, steps=4, sampler=sampler, **options)
    if negative_prompt := options.get("negative_prompt"):
        options = options | {"negative_prompt": [negative_prompt] * 2}
    theirs = pipeline(PROMPTS, latents=torch.from_numpy(latents), num_inference_steps=4, **options).images
    for image, expected in zip(ours, theirs, strict=True):
        assert psnr_db(np.asarray(image), np.asarray(expected)) > 50


def test_sizes_and_pooled_embedding_reach_the_unet(bundle: Bundle) -> None:
    generator, latents = Generator(bundle), np.random.default_rng(1).standard_normal((1, 4, 16, 16), dtype=np.float32)
    conditions = generator.conditions(PROMPTS[0])
    expected = generator.predict(latents, [500], [conditions])
    for name in ("encoder_hidden_states", "text_embeds", "time_ids"):
        changed = generator.predict(latents, [500], [{**conditions, name: conditions[name] + 0.5}])
        assert np.abs(changed - expected).max() > 1e-4, name


@pytest.mark.parametrize(
    ("scheduler", "sampler", "steps"),
    [
        ("EulerAncestralDiscreteScheduler", "euler_a", 1),  # Turbo
        ("EulerAncestralDiscreteScheduler", "euler_a", 4),
        ("EulerDiscreteScheduler", "euler", 2),  # Lightning
        ("EulerDiscreteScheduler", "euler", 8),
    ],
)
def test_turbo_and_lightning_settings(
    folder: Path, bundle: Bundle, tmp_path: Path, scheduler: str, sampler: str, steps: int
) -> None:
    """Their scheduler files make few steps without guidance the defaults, and the images equal diffusers."""
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    change_json("scheduler/scheduler_config.json", _class_name=scheduler, timestep_spacing="trailing")(base)
    checkpoint = load_base(base)
    assert describe_model(checkpoint).sampler == SamplerDefaults(sampler, 4, 1.0, "epsilon")
    pipeline = load_pipeline(checkpoint, sampler, base)
    expected = generate_images(pipeline, PROMPTS, side=16, seed=1, steps=steps, guidance_scale=0.0)
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    write_pipeline_files(checkpoint, copy)
    images = Generator(Bundle.open(copy, threads=1, verify=False)).generate(
        PROMPTS, latents=expected.noise, steps=steps, guidance_scale=0.0, sampler=sampler
    )
    assert min(psnr_db(np.asarray(a), b) for a, b in zip(images, expected.images, strict=True)) > 50


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m"])
@pytest.mark.parametrize("strength", [0.72, 1.0])
def test_image_to_image_equals_diffusers(
    bundle: Bundle, pipeline: Any, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"image": SOURCE, "strength": strength, "num_inference_steps": 5}
    expected = edited_by_diffusers("Img2Img", pipeline, sampler, 5, monkeypatch, **options)
    ours = edited(bundle, sampler, strength)
    assert psnr_db(ours, np.asarray(expected)) > 50


@pytest.mark.parametrize("size", [(48, 32), (32, 40)])
def test_image_to_image_at_other_sizes_equals_diffusers(
    bundle: Bundle, pipeline: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UNet is told the width and the height of the source."""
    source = Image.fromarray(np.random.default_rng(4).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    options = {"image": source, "strength": 0.72, "num_inference_steps": 5}
    expected = edited_by_diffusers("Img2Img", pipeline, "euler", 5, monkeypatch, **options)
    ours = edited(bundle, "euler", 0.72, like=source, width=size[0], height=size[1])
    assert ours.shape == (*size[::-1], 3) and psnr_db(ours, np.asarray(expected)) > 50


def test_inpainting_equals_diffusers_inside_the_mask(
    bundle: Bundle, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repaint = np.zeros((32, 32), np.uint8)
    repaint[8:24, 4:20] = 255
    mask = Image.fromarray(repaint)
    options = {"image": SOURCE, "mask_image": mask, "strength": 0.72, "num_inference_steps": 5}
    expected = edited_by_diffusers("Inpaint", pipeline, "euler", 5, monkeypatch, height=32, width=32, **options)
    ours, inside = edited(bundle, "euler", 0.72, mask=mask), repaint > 0
    assert psnr_db(ours[inside], np.asarray(expected)[inside]) > 50
    np.testing.assert_array_equal(ours[~inside], np.asarray(SOURCE)[~inside])


def test_long_prompts_in_windows_equal_transformers(bundle: Bundle, pipeline: Any) -> None:
    """The states of all windows, and the pooled embedding of the first. Zeros stay zeros."""

    def ids(tokenizer: Any) -> torch.Tensor:
        words, room = tokenizer(LONG, add_special_tokens=False).input_ids, tokenizer.model_max_length - 2
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        windows = [words[i : i + room] for i in range(0, len(words), room)]
        assert len(windows) > 1
        return torch.tensor([[start, *window, end] + [pad] * (room - len(window)) for window in windows])

    first, second = ids(pipeline.tokenizer), ids(pipeline.tokenizer_2)
    assert not torch.equal(first, second)  # they pad with other tokens
    with torch.no_grad():
        states = pipeline.text_encoder(first, output_hidden_states=True).hidden_states[-2]
        larger = pipeline.text_encoder_2(second, output_hidden_states=True)
    expected = torch.cat([states, larger.hidden_states[-2]], dim=-1).flatten(0, 1).numpy()
    prompted, negative = Conditioner(bundle).pair(LONG, "", "chunk")
    np.testing.assert_allclose(prompted["encoder_hidden_states"], expected, atol=2e-5)
    np.testing.assert_allclose(prompted["text_embeds"], larger.text_embeds[0].numpy(), atol=2e-5)
    assert negative["encoder_hidden_states"].shape == expected.shape
    assert not any(array.any() for array in negative.values())


def test_batching_changes_no_pixel_by_more_than_one_level(bundle: Bundle) -> None:
    shared, own = batch_differences(bundle)
    assert shared <= 1 and own == 0


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
    assert specs["clip_text_encoder"].outputs == ("text_embeds",)
    assert specs["text_encoder"].outputs == ("last_hidden_state", "hidden_states.0", "hidden_states.1")


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.filterwarnings("ignore:.*changes the text encoder")
def test_lora_is_merged_into_the_unet_and_both_text_encoders(folder: Path, tmp_path: Path, form: str) -> None:
    """W + weight · change. Files of kohya name the blocks of the original repository."""
    changes = make_lora(folder, tmp_path / "a.safetensors", form=form)
    assert {part for part, _ in changes} == {"unet", "text_encoder", "text_encoder_2"}
    plain = load_base(folder)
    with_lora = load_base(folder, None, BaseOptions.of(lora=[f"{tmp_path / 'a.safetensors'}:0.5"]))
    assert plain.second and with_lora.second
    pairs = {
        "unet": (plain.unet, with_lora.unet),
        "text_encoder": (plain.text_encoder, with_lora.text_encoder),
        "text_encoder_2": (plain.second.model, with_lora.second.model),
    }
    for part, models in pairs.items():
        before, after = (model.state_dict() for model in models)
        for name, tensor in before.items():
            expected = tensor + 0.5 * changes.get((part, name), torch.zeros(()))
            torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5, msg=f"{part} {name}")
    assert plain.shared and not with_lora.shared  # search keeps CLIP's tower


def test_all_parts_are_downloaded_from_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_from_hub(folder, tmp_path, monkeypatch)
    checkpoint = load_base("hf:some/xl", folder / "clip")
    assert checkpoint.second and checkpoint.shared and not (tmp_path / "clip").exists()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_json("model_index.json", requires_aesthetics_score=True), "is the refiner of Stable Diffusion XL"),
        (change_json("model_index.json", _class_name="KolorsPipeline"), "two text encoders, but is 'KolorsPipeline'"),
        (change_json("model_index.json", force_zeros_for_empty_prompt="yes"), "is 'yes'; it must be true or false"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "SDXL without its second text encoder"),
        (change_json("unet/config.json", addition_embed_type=None), "addition_embed_type of the UNet is None"),
        (change_json("unet/config.json", time_cond_proj_dim=256), r"additional inputs \(time_cond_proj_dim 256\)"),
        (change_json("unet/config.json", addition_time_embed_dim=9), f"takes 72 added values, .* are {54 + POOLED}"),
        (change_json("unet/config.json", cross_attention_dim=48), r"and text_encoder_2/ return 80"),
        (change_json("text_encoder_2/config.json", max_position_embeddings=77), "text_encoder_2/ has 77"),
        (change_json("tokenizer_2/tokenizer_config.json", model_max_length=77), "tokenizer_2: model_max_length is 77"),
        (change_json("vae/config.json", latents_mean=[0.0] * 4), "the VAE states latents_mean"),
        (change_json("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "clips samples"),
        (change_json("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"), "made for EDM models"),
    ],
)
def test_other_pipelines_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    assert (LARGER, SIZE_WIDTH) == (48, 8)  # in the messages
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        load_base(copy)


def test_lora_of_another_family_is_refused(folder: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    make_lora(random_checkpoint, tmp_path / "a.safetensors", form="peft")
    with pytest.raises(CheckpointError, match="does not fit the base"):
        load_base(folder, None, BaseOptions.of(lora=[tmp_path / "a.safetensors"]))
    make_lora(folder, tmp_path / "b.safetensors", form="peft")
    with pytest.raises(CheckpointError, match="does not fit the base"):
        load_base(random_checkpoint, None, BaseOptions.of(lora=[tmp_path / "b.safetensors"]))


def test_folders_of_optimum_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("manifest.json", "image_encoder")
    optimum = shutil.copytree(bundle.path, tmp_path / "optimum", ignore=ignored)
    with pytest.raises(BundleError, match="two text encoders, such as Stable Diffusion XL, is opened only as a bundle"):
        Bundle.open(optimum, verify=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*changes the text encoder")
def test_bundle_with_a_lora_equals_diffusers(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    make_lora(folder, tmp_path / "a.safetensors", form="kohya")
    export = export_bundle(folder, tmp_path / "bundle", lora=[f"{tmp_path / 'a.safetensors'}:0.5"])
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 16), dtype=np.float32)
    (ours,) = Generator(Bundle.open(export.path)).generate(PROMPTS[0], latents=latents, steps=4)
    options: dict[str, Any] = {"latents": torch.from_numpy(latents), "num_inference_steps": 4, "guidance_scale": 5.0}
    (plain,) = pipeline(PROMPTS[0], **options).images
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    pipeline.fuse_lora(lora_scale=0.5)
    (theirs,) = pipeline(PROMPTS[0], **options).images
    assert psnr_db(np.asarray(ours), np.asarray(theirs)) > 50 > 30 > psnr_db(np.asarray(ours), np.asarray(plain))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": ["hidden_states.1", "hidden_states.9"]}, "text_encoder_2 has the outputs .*, but the runtime uses"),
        ({"states": ["hidden_states.1"]}, r"conditioning\.states is .* must be a list of 2"),
        ({"pooled_width": POOLED + 1}, f"text_embeds float32.*{POOLED}.*, but the model has .*{POOLED + 1}"),
        ({"zero_negative": 1}, r"conditioning\.zero_negative is 1; it must be true or false"),
        (None, "unet has the inputs .*, but the runtime uses"),
    ],
)
def test_graphs_that_do_not_fit_the_manifest_are_refused(
    bundle: Bundle, tmp_path: Path, changes: dict[str, Any] | None, message: str
) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    conditioning = manifest.pop("conditioning")
    if changes is not None:
        manifest["conditioning"] = conditioning | changes
    seal(copy, manifest)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


# --- other targets and precisions ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision", "least"),
    [("portable", "fp32", 50), ("tensorrt", "fp16", 35), ("cuda", "fp16", 35), ("cpu", "int8", 25)],
)
def test_targets_and_precisions_are_verified(
    folder: Path, tmp_path: Path, target: str, precision: str, least: float
) -> None:
    export = export_bundle(folder, tmp_path / "bundle", target=target, precision=precision)
    assert export.image.psnr_db >= least
    precisions = {graph.name: graph.precision for graph in export.graphs}
    assert precisions["unet"] == precisions["text_encoder_2"] == precision
    if precision == "fp16":  # the VAE states force_upcast
        assert precisions["vae_decoder"] == precisions["vae_encoder"] == "fp32"
