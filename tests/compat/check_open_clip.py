"""Run by an environment with open_clip: are converted models equal to it, feature by feature?

    python check_open_clip.py [FOLDER]      FOLDER: where to write models meanwhile; default: a temporary one

Random weights, so nothing is downloaded; every parameter is moved off its initial value, zeros and ones included.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from open_clip.model import CLIP
from safetensors.torch import save_file

from unidiff_sdk.training.checkpoints.encoders.open_clip import load_open_clip
from unidiff_sdk.training.objective.losses import sigmoid_itc

TOLERANCE = 1e-5
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 4.3637},
    "text_cfg": {"context_length": 16, "vocab_size": 300, "width": 48, "heads": 3, "layers": 2},
}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    compare_sigmoid_loss()
    for quick_gelu in (False, True):
        config = SMALL | ({"quick_gelu": True} if quick_gelu else {})
        here = folder / f"small-{quick_gelu}"
        here.mkdir()
        model = disturbed(CLIP(**config))
        (here / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}})
        )
        save(model, here / "open_clip_model.safetensors")
        loaded = load_open_clip(f"open_clip:{here}")
        assert loaded.image_processor.image_mean == (0.5,) * 3
        compare(f"small, quick_gelu {quick_gelu}", model, loaded.clip)
    for architecture in ("ViT-B-32", "ViT-B-32-quickgelu"):
        model = disturbed(open_clip.create_model(architecture))
        file = folder / f"{architecture}.safetensors"
        save(model, file)
        compare(architecture, model, load_open_clip(f"open_clip:{architecture}/{file}").clip)
        file.unlink()


@torch.no_grad()
def compare_sigmoid_loss() -> None:
    """The sigmoid loss of SigLIP, of pairs with different meanings."""
    generator = torch.Generator().manual_seed(0)
    u, v = (F.normalize(torch.randn(7, 5, generator=generator), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(2.3), torch.tensor(-4.0)
    expected = SigLipLoss()(u, v, scale.exp(), bias)
    error = (sigmoid_itc(u, v, scale, bias) - expected).abs().item()
    print(f"sigmoid loss differs by {error:.1e}")
    assert error <= TOLERANCE


def disturbed(model: CLIP) -> CLIP:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def save(model: CLIP, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)


@torch.no_grad()
def compare(name: str, theirs: CLIP, ours) -> None:
    """Unit features of pictures and of texts of several lengths, padded with zeros as open_clip pads."""
    size, text = ours.config.vision_config.image_size, ours.config.text_config
    pixels = torch.randn(4, 3, size, size)
    ids = torch.zeros(4, text.max_position_embeddings, dtype=torch.long)
    for row, length in enumerate((1, 4, 9, text.max_position_embeddings - 2)):
        ids[row, 0] = text.vocab_size - 2
        ids[row, 1 : length + 1] = torch.randint(1, text.vocab_size - 2, (length,))
        ids[row, length + 1] = text.vocab_size - 1
    answer = ours(input_ids=ids, pixel_values=pixels)
    pairs = {
        "pictures": (theirs.encode_image(pixels, normalize=True), answer.image_embeds),
        "texts": (theirs.encode_text(ids, normalize=True), answer.text_embeds),
        "temperature": (theirs.logit_scale, ours.logit_scale),
    }
    for what, (expected, actual) in pairs.items():
        error = (expected - actual).abs().max().item()
        print(f"{name}: {what} differ by at most {error:.1e}")
        assert error <= TOLERANCE, f"{name}: {what}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
