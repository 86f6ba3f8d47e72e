"""A model whose prompts have another text encoder than search: Stable Diffusion 2 and OpenCLIP in miniature."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unidiff_sdk.bundle import Bundle
from unidiff_sdk.encoder import Encoder
from unidiff_sdk.errors import ExportError
from unidiff_sdk.generator import Generator

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

LAYERS, HEADS, WIDTH, TOKENS = 3, 3, 48, 12
PROMPTS = ["a red striped dress", "green dotted boots"]


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts are conditioned by the last layer but one of a CLIP of width 48, normalised as its last would be.

    As in Stable Diffusion 2: GELU, linear projections in the UNet, heads given per block, v prediction, and a tokenizer
    that pads with "!" where CLIP's own pads with its end token.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from unidiff_sdk.training.checkpoint import load_checkpoint, save_checkpoint

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


def test_both_encoders_are_in_the_bundle(bundle: Bundle) -> None:
    graphs = bundle.manifest["graphs"]
    assert list(graphs["text_encoder"]["outputs"]) == ["last_hidden_state"]
    assert list(graphs["clip_text_encoder"]["outputs"]) == ["text_embeds"]
    assert (graphs["text_encoder"]["attention_nodes"], graphs["clip_text_encoder"]["attention_nodes"]) == (2, 3)
    assert bundle.manifest["embedding"]["shared_text_encoder"] is False
    assert bundle.manifest["parity"]["image"]["psnr_db"] >= 40
    assert (bundle.path / "clip_tokenizer" / "vocab.json").is_file()
    for name in ("text_encoder", "clip_text_encoder"):
        assert (bundle.path / name / "config.json").is_file()


def test_search_uses_clips_own_tower_and_tokenizer(bundle: Bundle, checkpoint: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    texts = [*PROMPTS, "", "a very long caption " * 5]
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "clip")
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    encoder = Encoder(bundle)
    np.testing.assert_array_equal(encoder.tokenise(texts), ids.numpy())
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(checkpoint / "clip").get_text_features(input_ids=ids)
    expected = getattr(expected, "pooler_output", expected)
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode_texts(texts), expected, atol=2e-5)


def test_pictures_equal_diffusers(bundle: Bundle, checkpoint: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, feature_extractor=None)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(1).standard_normal((2, 4, 16, 16), dtype=np.float32)
    settings: dict[str, Any] = {"guidance_scale": 4.0, "latents": latents}
    ours = Generator(bundle).generate(PROMPTS, steps=5, sampler="euler", **settings)
    settings["latents"] = torch.from_numpy(latents)
    theirs = pipeline(PROMPTS, num_inference_steps=5, **settings).images
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_a_clip_without_tokenizer_is_refused(tmp_path: Path) -> None:
    from unidiff_export.folder import clip_tokenizer

    checkpoint: Any = SimpleNamespace(path=tmp_path)
    with pytest.raises(ExportError, match=r"clip has no tokenizer.*put vocab.json and merges.txt there"):
        clip_tokenizer(checkpoint)
