"""Does a checkpoint load, tensor by tensor, in the libraries that are installed here? Needs none of this package.

    python -m venv .venv-compat && .venv-compat/bin/pip install -r tests/compat/requirements.txt
    .venv-compat/bin/python tests/compat/check_checkpoint.py CKPT

Both libraries only warn where a tensor is missing and leave it random, so every tensor is compared with the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file

CAPTIONS = ["a red striped dress with short sleeves", "Boots, GREEN & dotted!", "naïve café 2x", ""]


def compare(name: str, model: torch.nn.Module, file: Path) -> None:
    """Every parameter of the model is in the file, and equal to it (in float32)."""
    stored, loaded = load_file(file), model.state_dict()
    missing, differing = [], []
    for key, tensor in loaded.items():
        # transformers 5 drops the prefix from CLIPTextModel's own names.
        expected = stored.get(key, stored.get(f"text_model.{key}"))
        if key.endswith("position_ids"):
            continue
        if expected is None:
            missing.append(key)
        elif not torch.equal(tensor.float(), expected.float()):
            differing.append(key)
    if missing or differing:
        sys.exit(f"{name}: {len(missing)} tensors missing, {len(differing)} differ, e.g. {(missing + differing)[0]}")
    print(f"{name}: {len(loaded)} tensors equal")


def main(folder: Path) -> None:
    print(f"transformers {transformers.__version__}, diffusers {diffusers.__version__}")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for name in ("unet", "vae"):
        compare(name, getattr(pipeline, name), folder / name / "diffusion_pytorch_model.safetensors")
    compare("text_encoder", pipeline.text_encoder, folder / "text_encoder" / "model.safetensors")
    compare("clip", transformers.CLIPModel.from_pretrained(folder / "clip"), folder / "clip" / "model.safetensors")

    # transformers 5 has one tokenizer for both.
    fast = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer).from_pretrained(folder / "tokenizer")
    plain = transformers.CLIPTokenizer.from_pretrained(folder / "clip")
    expected = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert fast.get_vocab() == plain.get_vocab() == expected, "the vocabulary differs from vocab.json"
    for caption in CAPTIONS:
        ids = [t(caption, padding="max_length", truncation=True).input_ids for t in (fast, plain, pipeline.tokenizer)]
        assert ids[0] == ids[1] == ids[2], f"tokenizers disagree on {caption!r}: {ids}"
    print(f"tokenizer: {len(expected)} entries, {len(CAPTIONS)} captions alike")

    image = pipeline(CAPTIONS[0], num_inference_steps=2, output_type="np").images[0]
    print(f"pipeline: a picture of {image.shape[0]} x {image.shape[1]}, mean {image.mean():.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
