"""A checkpoint with random weights and a tokenizer trained on a few captions, made in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

CAPTIONS = (
    "a red striped dress with short sleeves",
    "green dotted boots on white",
    "a blue plaid shirt, long sleeves",
    "photo of a purple coat",
    "yellow trousers, cropped",
    "a plain teal mug",
)
IMAGE_SIZE, MAX_TOKENS, WIDTH = 32, 16, 32


def make_random_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder`: 32 px, latents 4x16x16, text and embeddings of width 32, 16 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel

    from unidiff_sdk.training.checkpoints.checkpoint import ImageProcessor
    from unidiff_sdk.training.checkpoints.saving import save_checkpoint

    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS)
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(projection_dim=WIDTH, text_config=tower | text, vision_config=tower | vision))
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    image_processor = ImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return save_checkpoint(
        folder,
        unet=unet,
        vae=vae,
        clip=clip,
        text_encoder=text_encoder_of(clip),
        tokenizer=tokenizer,
        scheduler=scheduler,
        image_processor=image_processor,
        meta={"name": "random", "synthetic": True},
    )


def text_encoder_of(clip):
    """The text tower of CLIP as a text encoder with the same parameters, in every version of transformers."""
    from transformers import CLIPTextModel

    if isinstance(clip.text_model, CLIPTextModel):
        return clip.text_model
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.text_model = clip.text_model
    return encoder


def train_tokenizer(captions):
    """A byte-level BPE tokenizer with the conventions of CLIP, trained on a few captions. It can encode every byte."""
    import json
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    specials = ["<|startoftext|>", "<|endoftext|>"]
    tokens = dict.fromkeys([*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *learned, *specials])
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merge_list = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        merge_list.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
