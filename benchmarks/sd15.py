"""A checkpoint of the shape of Stable Diffusion 1.5 with CLIP ViT-L/14, of random weights: `python sd15.py FOLDER`.

What its graphs cost in time, memory and bytes hangs on their shape alone. Its pictures mean nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

# The words of the captions, which int8 is calibrated with; the vocabulary is filled up to CLIP's size.
CAPTIONS = ("a red striped dress", "purple dotted boots", "a blue plaid shirt", "a plain teal mug")
TOKENS, VOCABULARY = 77, 49408


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write the checkpoint to FOLDER, in half precision: 2.8 GB."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel

    from unidiff_sdk.training.checkpoint import ImageProcessor, save_checkpoint

    torch.manual_seed(0)
    clip = CLIPModel(clip_config(text=(768, 12), vision=(1024, 24), patch=14, width=768))
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    save_checkpoint(
        folder,
        unet=UNet2DConditionModel(**UNET),
        vae=AutoencoderKL(**VAE),
        clip=clip,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        image_processor=ImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
        meta={"name": "sd15-random", "captions": list(CAPTIONS), "synthetic": True},
        dtype=torch.float16,
    )


# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5: unet/config.json, vae/config.json
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
VAE = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def clip_config(*, text: tuple[int, int], vision: tuple[int, int], patch: int, width: int) -> Any:
    """A CLIPConfig: (hidden size, layers) of its towers, 64 channels a head, pictures of 224 pixels."""
    from transformers import CLIPConfig

    def tower(size: int, layers: int) -> dict[str, int]:
        return {
            "hidden_size": size,
            "intermediate_size": 4 * size,
            "num_hidden_layers": layers,
            "num_attention_heads": size // 64,
            "projection_dim": width,
        }

    words = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    return CLIPConfig(
        projection_dim=width,
        text_config=tower(*text) | words | {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS},
        vision_config=tower(*vision) | {"image_size": 224, "patch_size": patch},
    )


def tokenizer() -> Any:
    """A tokenizer with the conventions and the size of CLIP's, which knows single bytes only."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    filling = [f"<{number}>" for number in range(VOCABULARY - 2 - len(known))]
    entries = [*known, *filling, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(entries)}), "utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", "utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


if __name__ == "__main__":
    main()
