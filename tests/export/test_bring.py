"""Exports of models as people have them: the bundle generates the images of diffusers, from the same files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from support.ldm_files import make_single_file
from support.lora_files import make_lora
from support.random_sdxl import make_random_sdxl

from unidiff_export import export_bundle
from unidiff_export.bundle.manifest import describe_model
from unidiff_export.bundle.model_card import model_card
from unidiff_export.cli import main
from unidiff_export.graphs.lowering import graph_specs
from unidiff_export.pipeline import generate_images, load_pipeline
from unidiff_export.verification import psnr_db
from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions
from unidiff_sdk.training.data.captions import tokenize

PROMPTS = ["a red striped dress", "green dotted boots"]
PROMPTS_WITH_TOKENS = ["a red striped <shoe>", "glow, green dotted boots"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:.*changes the text encoder"),
    pytest.mark.filterwarnings("ignore:Only prompts know the added tokens"),
]


def psnr(images: Sequence[Any], others: Sequence[Any]) -> float:
    """PSNR of the worst image."""
    return min(psnr_db(np.asarray(a), np.asarray(b)) for a, b in zip(images, others, strict=True))


def worst_psnr(
    bundle: Path, pipeline: Any, prompts: Sequence[str] = PROMPTS, *, steps: int = 4, guidance_scale: float = 5.0
) -> float:
    """PSNR of the worst image that the bundle generates from the latents of the pipeline, by DDIM."""
    latents = np.random.default_rng(0).standard_normal((2, 4, 16, 16), dtype=np.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        list(prompts), latents=torch.from_numpy(latents), num_inference_steps=steps, guidance_scale=guidance_scale
    ).images
    ours = Generator(Bundle.open(bundle, threads=1)).generate(
        prompts, latents=latents, sampler="ddim", steps=steps, guidance_scale=guidance_scale
    )
    return psnr(ours, theirs)


@dataclass(frozen=True)
class Additions:
    """Two LoRAs, two tokens and another VAE, and the pipeline that diffusers makes with them."""

    options: dict[str, Any]
    pipeline: Any


@pytest.fixture(scope="module")
def additions(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Additions:
    folder = tmp_path_factory.mktemp("additions")
    files = [folder / "kohya.safetensors", folder / "peft.safetensors"]
    make_lora(random_checkpoint, files[0], form="kohya", text=False)
    make_lora(random_checkpoint, files[1], form="peft", seed=1)
    torch.manual_seed(7)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(random_checkpoint / "vae"), scaling_factor=0.3)
    vae.save_pretrained(folder / "vae")
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint, vae=vae.eval())
    save_file({"<shoe>": torch.randn(3, 32)}, folder / "shoe.safetensors")
    save_file({"emb_params": torch.randn(1, 32)}, folder / "glow.safetensors")
    pipeline.load_textual_inversion(folder / "shoe.safetensors")
    pipeline.load_textual_inversion(folder / "glow.safetensors", token="glow")
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.8, 0.5])
    pipeline.fuse_lora()
    pipeline.set_progress_bar_config(disable=True)
    options = {"lora": [f"{files[0]}:0.8", f"{files[1]}:0.5"], "vae": folder / "vae"}
    options["textual_inversion"] = [folder / "shoe.safetensors", folder / "glow.safetensors"]
    return Additions(options, pipeline)


def same_search(encoded: np.ndarray, checkpoint: Path) -> bool:
    """Whether embeddings of PROMPTS are those of the base."""
    base = load_checkpoint(checkpoint)
    tokens = base.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        features = base.clip.get_text_features(**tokens)
    theirs = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1).numpy()
    return bool((encoded * theirs).sum(axis=1).min() > 0.99999)


def test_additions_reach_model_reference_and_card(random_checkpoint: Path, additions: Additions) -> None:
    loaded = load_base(random_checkpoint, options=BaseOptions.of(**additions.options))
    options = {"side": 16, "seed": 0, "steps": 2, "guidance_scale": 5.0}
    theirs = generate_images(additions.pipeline, PROMPTS_WITH_TOKENS, **options).images
    plain = StableDiffusionPipeline.from_pretrained(random_checkpoint)
    assert (
        psnr(theirs, generate_images(plain, PROMPTS_WITH_TOKENS, **options).images) < 30
    )  # the additions change the images
    # What the graphs are made of, and what they are compared with.
    for pipeline in (load_pipeline(loaded, "ddim"), load_pipeline(loaded, "ddim", random_checkpoint)):
        assert psnr(theirs, generate_images(pipeline, PROMPTS_WITH_TOKENS, **options).images) > 50

    # Search is that of the base: its text tower and image tower are unchanged.
    model = describe_model(loaded)
    assert model.embedding and not model.embedding.shared_text_encoder and model.latent.scaling_factor == 0.3
    (text,) = (spec for spec in graph_specs(loaded) if spec.name == "clip_text_encoder")
    with torch.no_grad():
        embeddings = text.module(tokenize(loaded.clip_tokenizer, PROMPTS))
    assert same_search(torch.nn.functional.normalize(embeddings, dim=-1).numpy(), random_checkpoint)

    card = model_card(Manifest.read(TINY), loaded.meta, "random")
    assert "`kohya.safetensors` (weight 0.8), `peft.safetensors` (weight 0.5)." in card and "VAE: `vae`." in card
    assert "`<shoe>` (`shoe.safetensors`), `glow` (`glow.safetensors`)" in card


@pytest.mark.slow
def test_bundle_with_additions_equals_diffusers(random_checkpoint: Path, additions: Additions, tmp_path: Path) -> None:
    export_bundle(random_checkpoint, tmp_path / "bundle", **additions.options)
    assert worst_psnr(tmp_path / "bundle", StableDiffusionPipeline.from_pretrained(random_checkpoint)) < 30
    for prompts in (PROMPTS, PROMPTS_WITH_TOKENS):
        assert worst_psnr(tmp_path / "bundle", additions.pipeline, prompts) > 50
    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert "`kohya.safetensors` (weight 0.8), `peft.safetensors` (weight 0.5)." in card and "VAE: `vae`." in card
    assert "`<shoe>` (`shoe.safetensors`), `glow` (`glow.safetensors`)" in card
    bundle = Bundle.open(tmp_path / "bundle", threads=1)
    assert same_search(Encoder(bundle).encode_texts(PROMPTS), random_checkpoint)
    assert bundle.manifest.embedding and not bundle.manifest.embedding.shared_text_encoder


@pytest.mark.slow
def test_command_exports_a_variant_with_a_lora(random_checkpoint: Path, tmp_path: Path) -> None:
    half, lora = tmp_path / "half", tmp_path / "a.safetensors"
    StableDiffusionPipeline.from_pretrained(random_checkpoint, torch_dtype=torch.float16).save_pretrained(
        half, variant="fp16", max_shard_size="50KB"
    )
    make_lora(random_checkpoint, lora, text=False)
    command = [
        str(half),
        "--clip",
        str(random_checkpoint / "clip"),
        "-o",
        str(tmp_path / "bundle"),
        "--variant",
        "fp16",
    ]
    result = CliRunner().invoke(main, [*command, "--lora", f"{lora}:0.5"])
    assert result.exit_code == 0, result.output
    pipeline = StableDiffusionPipeline.from_pretrained(half, variant="fp16", torch_dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert worst_psnr(tmp_path / "bundle", pipeline) > 50


def test_reference_of_a_single_file_is_the_pipeline_it_was_made_from(random_checkpoint: Path, tmp_path: Path) -> None:
    file = make_single_file(random_checkpoint, tmp_path / "shop.safetensors")
    loaded = load_base(file, random_checkpoint / "clip", BaseOptions.of(base_config=random_checkpoint))
    options = {"side": 16, "seed": 0, "steps": 2, "guidance_scale": 5.0}
    theirs = generate_images(StableDiffusionPipeline.from_pretrained(random_checkpoint), PROMPTS, **options)
    assert psnr(theirs.images, generate_images(load_pipeline(loaded, "ddim", file), PROMPTS, **options).images) > 50


def test_reference_of_a_single_file_of_sdxl_is_the_pipeline_it_was_made_from(tmp_path: Path) -> None:
    base = make_random_sdxl(tmp_path / "xl")
    file = make_single_file(base, tmp_path / "xl.safetensors", text="xl")
    loaded = load_base(file, base / "clip", BaseOptions.of(base_config=base))
    options = {"side": 16, "seed": 0, "steps": 2, "guidance_scale": 5.0}
    theirs = generate_images(StableDiffusionXLPipeline.from_pretrained(base), PROMPTS, **options)
    assert psnr(theirs.images, generate_images(load_pipeline(loaded, "euler", file), PROMPTS, **options).images) > 50


@pytest.mark.slow
def test_command_exports_a_single_file(random_checkpoint: Path, tmp_path: Path) -> None:
    file = make_single_file(random_checkpoint, tmp_path / "shop.safetensors", half=True)
    clip, out = str(random_checkpoint / "clip"), str(tmp_path / "bundle")
    command = [str(file), "--clip", clip, "--base-config", str(random_checkpoint), "-o", out]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    pipeline = StableDiffusionPipeline.from_single_file(str(file), config=str(random_checkpoint), safety_checker=None)
    assert worst_psnr(tmp_path / "bundle", pipeline.to(torch.float32)) > 50
    bundle = Bundle.open(tmp_path / "bundle", threads=1)
    assert bundle.manifest.embedding and bundle.manifest.embedding.shared_text_encoder


def test_loaded_checkpoint_takes_no_additions(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="already loaded, so nothing can be added"):
        export_bundle(load_checkpoint(random_checkpoint), tmp_path / "bundle", variant="fp16")
