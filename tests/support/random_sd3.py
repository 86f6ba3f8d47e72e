"""A Stable Diffusion 3.5 of random weights in diffusers' layout, with its CLIP, made in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .random_checkpoint import CAPTIONS, IMAGE_SIZE, WIDTH
from .random_sdxl import POOLED, make_text_models, make_vae, write_clip

JOINT = 96  # width of what T5 returns
LARGEST_SIDE = 48  # pixels that the transformer has positions for


def make_random_sd3(
    folder: Path,
    *,
    dual_attention: bool = True,
    third: bool = False,
    largest_side: int = LARGEST_SIDE,
    **scheduler: Any,
) -> Path:
    """Write a pipeline into `folder` and its CLIP into `folder`/clip: 32 px, latents 16x16x16, 16 tokens.

    As in the published 3.5 medium, with its T5 only if `third`: dual attention in the first layers, normalized
    queries and keys, two text encoders with projections, of which the first is the text side of CLIP, a second
    tokenizer that pads with "!", and a VAE with a shift. Without `dual_attention` as in Stable Diffusion 3.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(1)
    tokenizer, model, second = make_text_models()
    own = model.config.text_config.to_dict() | {"projection_dim": WIDTH}  # which CLIP states once, for both towers
    first = CLIPTextModelWithProjection(CLIPTextConfig(**own))
    first.text_model.load_state_dict(model.text_model.state_dict())
    first.text_projection.load_state_dict(model.text_projection.state_dict())
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 2,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=JOINT,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH + POOLED,
        pos_embed_max_size=largest_side // 4,
        dual_attention_layers=(0, 1) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None,
    )
    vae = make_vae(
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tokenizer.save_pretrained(folder / "tokenizer_2")
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=_make_t5() if third else None,
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2", pad_token="!"),
        tokenizer_3=_make_t5_tokenizer() if third else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
    )
    pipeline.save_pretrained(folder)
    write_clip(model, tokenizer, folder / "clip")
    (folder / "unidiff.json").write_text('{"sampler": {"steps": 4}}')  # instead of 28, to verify exports in seconds
    return folder


def _make_t5() -> Any:
    """An encoder with gated activations, and heads that are together wider than the model."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": JOINT, "d_kv": 40, "d_ff": 64, "num_layers": 2, "num_heads": 3}
    return T5EncoderModel(T5Config(vocab_size=64, feed_forward_proj="gated-gelu", **sizes))


def _make_t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    words = dict.fromkeys(f"▁{word}" for caption in CAPTIONS for word in caption.replace(",", "").split()[:4])
    pieces = ["<pad>", "</s>", "<unk>", "▁", *words, *"abcdefghijklmnopqrstuvwxyz,."]
    scores = [(piece, 0.0 if piece[0] == "<" else -float(3 if len(piece) > 1 else 8)) for piece in pieces]
    return T5TokenizerFast(vocab=scores, extra_ids=0)
