"""A SigLIP with random weights and a SentencePiece-like tokenizer, made in a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZE, TOKENS, WIDTH = 24, 10, 32


def make_siglip(folder: Path, **preprocessing: Any) -> Path:
    """Write a transformers folder: 24 px, 10 tokens, width 32, squashed images."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    tokens = write_tokenizer(folder)
    tower = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=tower | {"vocab_size": tokens + 3, "max_position_embeddings": TOKENS},
        vision_config=tower | {"image_size": SIZE, "patch_size": 8},
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    steps = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(steps | preprocessing), encoding="utf-8")
    return folder


PATCH, PATCHES = 8, 30  # side of a patch, and the most patches of an image


def make_naflex_base(folder: Path) -> Path:
    """Write one of the size of siglip2-base-patch16-naflex, but for the vocabulary: at most 256 patches of 16 px."""
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return make_naflex(folder, tower=tower, patch=16, patches=256, positions=256, tokens=64, noise=0.01)


def make_naflex(
    folder: Path,
    *,
    tower: Mapping[str, int] | None = None,
    patch: int = PATCH,
    patches: int = PATCHES,
    positions: int = 25,
    tokens: int = TOKENS,
    noise: float = 0.1,
    **preprocessing: Any,
) -> Path:
    """Write a transformers folder of a NaFlex SigLIP 2, by default with at most 30 patches of 8 px, positions 5x5.

    positions: A square number: the positions that the model was trained with.
    noise: Standard deviation of what is added to all weights, so that no bias is zero.
    """
    import torch
    from transformers import Siglip2Config, Siglip2Model

    torch.manual_seed(0)
    vocabulary = write_tokenizer(folder) + 3
    small = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = dict(tower or small)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = Siglip2Config(
        text_config=sizes | ids | {"vocab_size": vocabulary, "max_position_embeddings": tokens},
        vision_config=sizes | {"num_patches": positions, "patch_size": patch},
    )
    model = Siglip2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    steps = {
        "image_processor_type": "Siglip2ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": patch,
        "max_num_patches": patches,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(steps | preprocessing), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer as SigLIP has it: lower case, no punctuation, an end token that also pads."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789ünic日本"
    words = ["▁a", "▁red", "▁dress", "▁photo", "▁of", "▁long", "ing"]
    pieces = ["<unk>", "</s>", *words, "▁", *dict.fromkeys(letters)]
    scores = [(piece, 0.0 if piece[0] == "<" else -float(3 if len(piece) > 1 else 8)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    punctuation = Regex(r"[!-/:-@\[-`{-~]")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(punctuation, ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "SiglipTokenizer",
        "model_input_names": ["input_ids"],
        "pad_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(pieces)


def write_gemma_tokenizer(folder: Path) -> None:
    """Replace the tokenizer of a SigLIP by one as SigLIP 2 has it: byte fallback, an end token and a pad token."""
    from transformers import GemmaTokenizer

    symbols = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzADR,"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *symbols, "re", "red", "▁re"]
    tokenizer = GemmaTokenizer(
        vocab={token: n for n, token in enumerate(tokens)},
        merges=[("r", "e"), ("re", "d"), ("▁", "re")],
        padding_side="right",
        model_max_length=TOKENS,
        model_input_names=["input_ids"],
        add_bos_token=False,
        add_eos_token=True,
    )
    tokenizer.save_pretrained(folder)
