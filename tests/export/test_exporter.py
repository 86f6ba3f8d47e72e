"""A whole export: the content of the bundle, and its agreement with PyTorch."""

from __future__ import annotations

import json
import shutil
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from PIL import Image
from support.batching import batch_differences

from unidiff_export import Export, export_bundle
from unidiff_export.bundle.files import write_pipeline_files
from unidiff_export.bundle.manifest import describe_model
from unidiff_export.exporter import warn_of_replacement
from unidiff_export.pipeline import generate_images, load_pipeline
from unidiff_export.verification import psnr_db
from unidiff_sdk.errors import ExportError, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import Latent, SamplerDefaults
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiff_sdk.training.objective.joint_model import JointModel

INTERFACE = {
    "text_encoder": ({"input_ids": "int64"}, ["last_hidden_state", "text_embeds"]),
    "image_encoder": ({"pixel_values": "float32"}, ["image_embeds"]),
    "unet": ({"sample": "float32", "timestep": "float32", "encoder_hidden_states": "float32"}, ["out_sample"]),
    "vae_decoder": ({"latent_sample": "float32"}, ["sample"]),
    "vae_encoder": ({"sample": "float32"}, ["latent_sample"]),
}
TEXTS = ["a red striped dress", "green dotted boots"]


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


@pytest.fixture(scope="module")
def export(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_bundle(random_checkpoint, tmp_path_factory.mktemp("export") / "bundle")


@pytest.fixture(scope="module")
def bundle(export: Export) -> Bundle:
    return Bundle.open(export.path, threads=1)


def test_manifest_describes_the_model(bundle: Bundle, export: Export, checkpoint: Checkpoint) -> None:
    manifest = bundle.manifest
    assert (manifest.name, manifest.precision, manifest.target, manifest.opset) == ("bundle", "fp32", "cpu", 23)
    assert manifest.image and manifest.image.fit == "crop"
    assert manifest.embedding and manifest.embedding.dim == checkpoint.clip.config.projection_dim
    assert bundle.logit_scale == pytest.approx(checkpoint.clip.logit_scale.exp().item())
    scaling_factor = checkpoint.vae.config.scaling_factor
    assert manifest.latent == Latent(
        channels=4, size=16, scale_factor=2, scaling_factor=scaling_factor, shift_factor=0.0
    )
    assert manifest.sampler == SamplerDefaults("ddim", 20, 5.0, "epsilon")
    assert manifest.synthetic is True
    assert manifest.devices == ("cpu", "cuda")
    profiles = {name: graph.profile or {} for name, graph in manifest.graphs.items()}
    assert profiles["unet"]["sample"] == {"min": [1, 4, 8, 8], "opt": [2, 4, 16, 16], "max": [16, 4, 24, 24]}
    assert {name: profile.keys() for name, profile in profiles.items()} == {
        name: inputs.keys() for name, (inputs, _) in INTERFACE.items()
    }
    assert export.bytes == sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())


def test_manifest_holds_the_evidence(bundle: Bundle) -> None:
    parity = dict(bundle.manifest.parity)
    image, search, embeddings = (parity.pop(name) for name in ("image", "search", "embeddings"))
    assert parity.keys() == INTERFACE.keys()
    for figures in parity.values():
        assert figures["max_abs_error"] <= figures["tolerance"] == 1e-4
        assert figures["cosine"] > 0.999999
    assert image["psnr_db"] >= image["tolerance_db"] == 45
    assert image["agreement"] == pytest.approx(image["reference_agreement"], abs=1e-3)
    assert (search["pairs"], search["recall_at_1"]) == (2, search["reference_recall_at_1"])
    assert embeddings["min_cosine"] == 0.9999
    assert embeddings["text_cosine"] > 0.99999 and embeddings["image_cosine"] > 0.99999


def test_manifest_holds_time_memory_and_sizes(bundle: Bundle, export: Export) -> None:
    assert bundle.manifest.export == {
        "seconds": round(export.seconds, 1),
        "peak_mib": export.peak_bytes >> 20,
    }
    for name, graph in bundle.manifest.graphs.items():
        assert graph.bytes == sum(file.stat().st_size for file in (bundle.path / name).glob("model.onnx*"))


# As published with Stable Diffusion 1.5: without timestep_spacing, whose default depends on the class.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULER_FILES: list[dict[str, Any]] = [
    {},
    {"steps_offset": 0, "timestep_spacing": "leading"},
    {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True},
    {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, "prediction_type": "v_prediction"},
    {"_class_name": "EulerDiscreteScheduler", "steps_offset": 0, "use_karras_sigmas": True},
    {"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True},
    {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": False},
    {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "lambda_min_clipped": -5.1},
    {"_class_name": "LCMScheduler"},
    {"_class_name": "DEISMultistepScheduler", "num_train_timesteps": 800, "beta_schedule": "squaredcos_cap_v2"},
]


@pytest.mark.parametrize(
    "scheduler_file", SCHEDULER_FILES, ids=lambda file: ",".join(map(str, file.values())) or "PNDM"
)
def test_images_equal_those_of_diffusers_for_each_scheduler_file(
    random_checkpoint: Path, export: Export, tmp_path: Path, scheduler_file: dict[str, Any]
) -> None:
    """The bundle's default sampler, from the files that a training or an export writes after reading the base."""
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    content = json.dumps(PUBLISHED | scheduler_file)
    (base / "scheduler" / "scheduler_config.json").write_text(content, encoding="utf-8")
    checkpoint = load_base(base)
    name, steps = checkpoint.sampler_defaults["name"], 4
    pipeline = load_pipeline(checkpoint, name, base)
    expected = generate_images(
        pipeline, TEXTS, side=16, seed=1, steps=steps, guidance_scale=5.0, negative_prompt="a blue coat"
    )
    bundle = Path(shutil.copytree(export.path, tmp_path / "bundle"))
    write_pipeline_files(checkpoint, bundle)
    images = Generator(Bundle.open(bundle, threads=1, verify=False)).generate(
        TEXTS, latents=expected.noise, sampler=name, steps=steps, guidance_scale=5.0, negative_prompt="a blue coat"
    )
    assert min(psnr_db(np.asarray(a), b) for a, b in zip(images, expected.images, strict=True)) > 60


def test_replaced_scheduler_is_warned_about_and_recorded(random_checkpoint: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"model is PNDMScheduler, .* The sampler dpm\+\+2m generates instead"):
        checkpoint = warn_of_replacement(load_base(base))
    assert describe_model(checkpoint).sampler.replaces == "PNDMScheduler"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert describe_model(warn_of_replacement(load_base(random_checkpoint))).sampler.replaces is None


def test_shift_factor_of_the_vae_is_ignored_as_in_diffusers(checkpoint: Checkpoint) -> None:
    vae = deepcopy(checkpoint.vae)
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    shifted = replace(checkpoint, vae=vae)
    assert describe_model(shifted).latent.shift_factor == 0.0
    pixels = torch.rand(1, 3, 32, 32)
    latents = JointModel(shifted).encode(pixels)
    torch.testing.assert_close(latents, 0.5 * vae.encode(2 * pixels - 1).latent_dist.mode())
    decoded = JointModel(shifted).decode(latents)
    torch.testing.assert_close(decoded, vae.decode(latents / 0.5).sample / 2 + 0.5)


def test_graphs_have_the_expected_interface(bundle: Bundle) -> None:
    for name, (inputs, outputs) in INTERFACE.items():
        session, described = bundle.session(name), bundle.manifest.graphs[name]
        assert list(session.inputs) == list(inputs) == list(described.inputs)
        assert list(session.outputs) == outputs == list(described.outputs)
        assert {key: value.dtype for key, value in described.inputs.items()} == inputs
        assert session.inputs == described.inputs


def test_each_attention_layer_is_one_node(bundle: Bundle, checkpoint: Checkpoint) -> None:
    found = {name: graph.attention_nodes for name, graph in bundle.manifest.graphs.items()}
    unet_transformers = sum("attn1" in name for name in checkpoint.unet.attn_processors)
    assert found == {
        "text_encoder": checkpoint.clip.config.text_config.num_hidden_layers,
        "image_encoder": checkpoint.clip.config.vision_config.num_hidden_layers,
        "unet": 2 * unet_transformers,
        "vae_decoder": 1,
        "vae_encoder": 1,
    }


def test_text_encoder_is_causal(bundle: Bundle) -> None:
    ids = np.arange(3, 19, dtype=np.int64)[None]
    changed = ids.copy()
    changed[0, 8:] += 1
    before, after = (bundle.session("text_encoder").run({"input_ids": x})["last_hidden_state"] for x in (ids, changed))
    np.testing.assert_allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-3


def test_unet_accepts_other_sizes_and_a_single_timestep(bundle: Bundle, checkpoint: Checkpoint) -> None:
    sample, states = torch.randn(3, 4, 8, 24), torch.randn(3, 5, 32)
    with torch.no_grad():
        expected = checkpoint.unet(sample, torch.tensor(37.25), states).sample.numpy()
    inputs = {"sample": sample.numpy(), "timestep": np.float32([37.25]), "encoder_hidden_states": states.numpy()}
    np.testing.assert_allclose(bundle.session("unet").run(inputs)["out_sample"], expected, atol=1e-5)


def test_runtime_embeddings_agree_with_transformers(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Including tokenizer, preprocessing and projection."""
    clip, encoder = checkpoint.clip, Encoder(bundle)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    tokens = checkpoint.tokenizer(TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    pixels = checkpoint.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        texts = clip.get_text_features(input_ids=tokens["input_ids"])
        images = clip.get_image_features(pixel_values=pixels["pixel_values"])
    for ours, theirs in ((encoder.encode_texts(TEXTS), texts), (encoder.encode_images([image]), images)):
        reference = getattr(theirs, "pooler_output", theirs)
        np.testing.assert_allclose(ours, torch.nn.functional.normalize(reference, dim=-1).numpy(), atol=1e-5)


def test_layout_loads_in_diffusers_and_transformers(bundle: Bundle, checkpoint: Checkpoint) -> None:
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizer

    assert CLIPTokenizer.from_pretrained(bundle.path / "tokenizer")(TEXTS) == checkpoint.tokenizer(TEXTS)
    assert DDIMScheduler.from_pretrained(bundle.path / "scheduler").config.steps_offset == 1
    index = json.loads((bundle.path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for name in INTERFACE:
        assert (bundle.path / name / "config.json").is_file()
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "image_encoder/preprocessor_config.json"):
        assert (bundle.path / name).is_file()


def test_bundle_contains_no_paths_of_the_machine(bundle: Bundle, random_checkpoint: Path) -> None:
    paths = {str(random_checkpoint.parent), str(bundle.path.parent), str(Path.home()), str(Path(__file__).parents[2])}
    for file in bundle.path.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not [path for path in paths if path.encode() in content], file


def test_export_does_not_change_the_checkpoint(export: Export, checkpoint: Checkpoint, random_checkpoint: Path) -> None:
    fresh = load_checkpoint(random_checkpoint)
    for part in ("unet", "vae", "clip"):
        ours, theirs = getattr(checkpoint, part), getattr(fresh, part)
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.slow
def test_fp16_bundle_is_smaller_and_generates_the_same_images(
    random_checkpoint: Path, export: Export, bundle: Bundle, tmp_path: Path
) -> None:
    half = export_bundle(random_checkpoint, tmp_path / "half", precision="fp16")
    assert {graph.precision for graph in half.graphs} == {"fp16"}
    assert half.image.psnr_db >= 35
    opened = Bundle.open(half.path, threads=1)
    for name in INTERFACE:
        graph, single = (b.path / b.manifest.graphs[name].file for b in (opened, bundle))
        assert graph.stat().st_size < 0.75 * single.stat().st_size
        assert opened.manifest.graphs[name].inputs == bundle.manifest.graphs[name].inputs
    shared, own = batch_differences(opened)
    assert shared <= 2 and own == 0


def test_unknown_options_are_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="precision is 'fp8'; use one of fp32, fp16, int8"):
        export_bundle(random_checkpoint, tmp_path / "out", precision="fp8")
    with pytest.raises(OptionError, match="target is 'tpu'; use one of cpu"):
        export_bundle(random_checkpoint, tmp_path / "out", target="tpu")
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_refused(random_checkpoint: Path, export: Export) -> None:
    with pytest.raises(ExportError, match=r"already exists.*--overwrite"):
        export_bundle(random_checkpoint, export.path)
