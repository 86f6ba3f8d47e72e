"""The tiny architecture: the components of Stable Diffusion and CLIP, for 64 px, in about five million parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

IMAGE_SIZE = 64
MAX_TOKENS = 32
VOCABULARY = 1024
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def train_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Train a byte-pair vocabulary of at most 1,024 entries, with the normalization and end-of-word marks of CLIP."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = CLIPTokenizer(vocab={}, merges=[], unk_token=END).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]
    learned = sorted(bpe["vocab"], key=bpe["vocab"].get)
    # Every byte has two tokens, within a word and at its end, so that no text is unknown. CLIP would read an unknown
    # token as the end of the text.
    tokens = dict.fromkeys([*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *learned, START, END])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in bpe["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_vae() -> AutoencoderKL:
    """A VAE with factor 4: 3x64x64 pixels to 4x16x16 latents. 0.8 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP with two four-layer towers of width 128. 1.3 M parameters. The text tower also conditions the UNet."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPModel(
        CLIPConfig(
            projection_dim=WIDTH,
            text_config=tower | text | {"projection_dim": WIDTH},
            vision_config=tower | vision | {"projection_dim": WIDTH},
        )
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet with two resolutions, 16x16 and 8x8, the latter with cross-attention. 3 M parameters."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion (scaled linear), with v prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def build_image_processor() -> CLIPImageProcessorPil:
    """The image preprocessing of CLIP at 64 px."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
