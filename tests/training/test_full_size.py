"""Stable Diffusion 1.5 and CLIP ViT-L/14 at full size, with random weights, within 24 GB of memory.

Full fine-tuning does not fit: weights, gradients, AdamW's two moments and averages of 1.29 billion parameters take
25.8 GB. Adapters fit. Each stage runs in a separate process and prints its peak.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the train extra")

from support.peak_memory import run_measured

GB = 1e9
LIMIT = 24 * GB
MAKE = """
import json, sys, torch
from pathlib import Path
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer
from unidiff_sdk.training.checkpoints.checkpoint import ImageProcessor

out, words = Path(sys.argv[1]), 49408
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
tokens += [f"<filler-{n}>" for n in range(words - 2 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
out.mkdir()
(out / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
(out / "merges.txt").write_text("#version: 0.2\\n")
tokenizer = CLIPTokenizer.from_pretrained(out, model_max_length=77)

torch.manual_seed(0)
torch.set_default_dtype(torch.float16)  # half the disk; it is opened in float32
text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
text |= {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
vision |= {"image_size": 224, "patch_size": 14}
clip = CLIPModel(CLIPConfig(projection_dim=768, text_config=text, vision_config=vision))
text_encoder = clip.text_model if isinstance(clip.text_model, CLIPTextModel) else CLIPTextModel(clip.config.text_config)
if text_encoder is not clip.text_model:
    text_encoder.text_model = clip.text_model
unet = UNet2DConditionModel(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
)
vae = AutoencoderKL(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)
scheduler = PNDMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
)
counts = {name: sum(p.numel() for p in model.parameters()) for name, model in {"unet": unet, "clip": clip}.items()}
print(json.dumps(counts))
StableDiffusionPipeline(
    vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
).save_pretrained(out / "sd")
clip.save_pretrained(out / "clip")
tokenizer.save_pretrained(out / "clip")
ImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}).save_pretrained(out / "clip")
"""
STEP = """
import sys
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.loop.trainer import train

base, data, out = sys.argv[1:]
config = TrainingConfig(
    steps=1, batch_size=2, micro_batch=1, warmup_steps=0, learning_rate=1e-2, ema_decay=0.0,
    lora_unet=8, lora_text=8, lora_image=8, checkpoint_activations=True,
)
result = train(data, f"{base}/sd", out, config, device="cpu", clip=f"{base}/clip", on_start=lambda c: print(c.shared))
print(result.losses)
"""
OPEN = """
import sys, torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

base, out = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(out)
name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
loaded = pipeline.unet.state_dict()
with safe_open(f"{base}/sd/unet/diffusion_pytorch_model.safetensors", "pt") as before:
    moved = [name for name in before.keys() if not torch.equal(before.get_tensor(name).float(), loaded[name])]
assert name in moved and all(".to_" in each for each in moved), moved[:5]
print("moved", len(moved))
"""


@pytest.mark.slow
def test_one_joint_step_at_full_size_stays_within_24_gb(
    small_catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Load, one step of ITC and IS at 512 pixels, save, and open in diffusers."""
    data = tmp_path / "data"
    data.mkdir()
    rows = (small_catalog / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    for row in rows:
        name = json.loads(row)["file_name"]
        (data / name).write_bytes((small_catalog / name).read_bytes())
    (data / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")

    (counts, *_), _ = run_measured(MAKE, tmp_path / "base")
    assert json.loads(counts) == {"unet": 859_520_964, "clip": 427_616_513}, "the published sizes"
    (shared, losses, *_), training = run_measured(STEP, tmp_path / "base", data, tmp_path / "out")
    assert shared == "True" and "itc" in losses and "is" in losses
    _, opening = run_measured(OPEN, tmp_path / "base", tmp_path / "out")
    with capsys.disabled():
        print(f"\npeak: {training / GB:.1f} GB to train and save, {opening / GB:.1f} GB to open in diffusers")
    assert max(training, opening) < LIMIT
