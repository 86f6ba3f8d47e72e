"""A Stable Diffusion XL of random weights in diffusers' layout, with its CLIP, made in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .random_checkpoint import CAPTIONS, IMAGE_SIZE, MAX_TOKENS, WIDTH, text_encoder_of, train_tokenizer

LARGER, POOLED, SIZE_WIDTH = 48, 24, 8  # widths of the second text encoder, of its embedding, and of each size


def make_random_sdxl(folder: Path, **scheduler: Any) -> Path:
    """Write a pipeline into `folder` and its CLIP into `folder`/clip: 32 px, latents 4x16x16, 16 tokens.

    As in the published model: separate text encoders with other activations, a second tokenizer that pads with "!",
    linear projections, heads and transformer layers listed for each block, and a VAE in need of float32.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    tokenizer, model, second = make_text_models()
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        transformer_layers_per_block=(1,),
        cross_attention_dim=WIDTH + LARGER,
        attention_head_dim=(4,),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=6 * SIZE_WIDTH + POOLED,
    )
    vae = make_vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True)
    tokenizer.save_pretrained(folder / "tokenizer_2")
    published = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder_of(model),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2", pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**published | scheduler),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    write_clip(model, tokenizer, folder / "clip")
    return folder


def make_text_models() -> tuple[Any, Any, Any]:
    """A tokenizer, a CLIP, and a text encoder that is larger than that of CLIP and projects."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = train_tokenizer(CAPTIONS)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "num_hidden_layers": 1}
    model = CLIPModel(CLIPConfig(projection_dim=WIDTH, text_config=tower | text, vision_config=tower | vision))
    larger = {
        "hidden_size": LARGER,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "hidden_act": "gelu",
        "projection_dim": POOLED,
    }
    return tokenizer, model, CLIPTextModelWithProjection(CLIPTextConfig(**tower | text | larger))


def make_vae(**config: Any) -> Any:
    """A VAE that halves the sides of an image."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        **config,
    )


def write_clip(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a CLIP with its tokenizer and its image preprocessing."""
    from unidiff_sdk.training.checkpoints.checkpoint import ImageProcessor

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
