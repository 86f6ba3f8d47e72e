"""Models with separate text encoders for prompts and search, like Stable Diffusion 2 with OpenCLIP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unidiff_sdk.errors import ExportError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

LAYERS, HEADS, WIDTH, TOKENS = 3, 3, 48, 12
PROMPTS = ["a red striped dress", "green dotted boots"]


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet conditioned on the second-to-last layer of a CLIP of width 48, normalized like its last layer.

    As in Stable Diffusion 2: GELU, linear projections in the UNet, heads per block, v prediction, and a tokenizer that
    pads with "!" while CLIP's own pads with its end token.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.checkpoints.saving import save_checkpoint

    torch.manual_seed(1)
    base = load_checkpoint(random_checkpoint)
    config = base.clip.config.to_dict()
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
        "max_position_embeddings": TOKENS,
    }
    text = config["text_config"] | tower | {"num_hidden_layers": LAYERS}
    clip = CLIPModel(CLIPConfig(projection_dim=24, text_config=text, vision_config=config["vision_config"]))
    text_encoder = CLIPTextModel(CLIPTextConfig(**text | {"num_hidden_layers": LAYERS - 1}))
    states = {name.removeprefix("text_model."): tensor for name, tensor in clip.text_model.state_dict().items()}
    inner = getattr(text_encoder, "text_model", text_encoder)
    inner.load_state_dict({name: states[name] for name in inner.state_dict()})
    unet = UNet2DConditionModel(
        sample_size=base.unet.config.sample_size,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    )
    folder = save_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "second",
        unet=unet,
        vae=base.vae,
        clip=clip,
        text_encoder=text_encoder,
        tokenizer=base.tokenizer,
        scheduler=type(base.scheduler).from_config(base.scheduler.config, prediction_type="v_prediction"),
        image_processor=base.image_processor,
        meta={"name": "second"},
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    tokenizer.model_max_length = TOKENS
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from unidiff_export import export_bundle

    return Bundle.open(export_bundle(checkpoint, tmp_path_factory.mktemp("export") / "bundle").path, threads=1)


def test_bundle_holds_both_text_encoders(bundle: Bundle) -> None:
    graphs = bundle.manifest.graphs
    assert list(graphs["text_encoder"].outputs) == ["last_hidden_state"]
    assert list(graphs["clip_text_encoder"].outputs) == ["text_embeds"]
    assert (graphs["text_encoder"].attention_nodes, graphs["clip_text_encoder"].attention_nodes) == (2, 3)
    embedding = bundle.manifest.embedding
    assert embedding and (embedding.shared_text_encoder, embedding.conditioning_layer) == (False, -2)
    assert bundle.manifest.parity["image"]["psnr_db"] >= 40
    assert (bundle.path / "clip_tokenizer" / "vocab.json").is_file()
    for name in ("text_encoder", "clip_text_encoder"):
        assert (bundle.path / name / "config.json").is_file()


def test_search_uses_clips_own_tower_and_tokenizer(bundle: Bundle, checkpoint: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    texts = [*PROMPTS, "", "a very long caption " * 5]
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "clip")
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    encoder = Encoder(bundle)
    np.testing.assert_array_equal(encoder.tokenize(texts), ids.numpy())
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(checkpoint / "clip").get_text_features(input_ids=ids)
    expected = getattr(expected, "pooler_output", expected)
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode_texts(texts), expected, atol=2e-5)


def test_images_agree_with_diffusers(bundle: Bundle, checkpoint: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, feature_extractor=None)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(1).standard_normal((2, 4, 16, 16), dtype=np.float32)
    options: dict[str, Any] = {"guidance_scale": 4.0, "latents": latents}
    ours = Generator(bundle).generate(PROMPTS, steps=5, sampler="euler", **options)
    options["latents"] = torch.from_numpy(latents)
    theirs = pipeline(PROMPTS, num_inference_steps=5, **options).images
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_tokenizer_of_another_clip_is_refused(checkpoint: Path) -> None:
    from unidiff_export.bundle.files import clip_tokenizer
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    size = loaded.clip.config.text_config.vocab_size
    loaded.clip.config.text_config.vocab_size = size - 1
    message = rf"vocabulary of {size - 1} tokens, but its tokenizer has {size}\. Put the matching vocab\.json"
    with pytest.raises(ExportError, match=message):
        clip_tokenizer(loaded)


def test_pipeline_and_clip_can_be_in_different_folders(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    """As they are published: a Stable Diffusion pipeline has no CLIP."""
    from unidiff_export.graphs.lowering import graph_specs
    from unidiff_sdk.training.checkpoints.bases import load_base

    pipeline = shutil.copytree(checkpoint, tmp_path / "pipeline", ignore=shutil.ignore_patterns("clip", "unidiff.json"))
    loaded = load_base(pipeline, checkpoint / "clip")
    specs = {spec.name: spec.module for spec in graph_specs(loaded)}
    assert list(specs) == list(bundle.manifest.graphs)
    ids = np.random.default_rng(0).integers(0, 500, (2, TOKENS))
    with torch.no_grad():
        states = specs["text_encoder"](torch.from_numpy(ids)).numpy()
    ours = bundle.session("text_encoder").run({"input_ids": ids})["last_hidden_state"]
    np.testing.assert_allclose(ours, states, atol=1e-5)
