"""Stable Diffusion in one file, with the names of the original repositories (CompVis latent-diffusion, OpenCLIP)."""

from __future__ import annotations

import re
from pathlib import Path

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",  # of Stable Diffusion XL
    "add_embedding.linear_2": "label_emb.0.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_name(name: str, layers: int, attention: set[int]) -> str:
    """The name of a UNet tensor. layers: per block. attention: the up blocks that have attention."""
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, index, rest = match.groups()
        position = 2 * int(index) if kind == "resnets" else 1
        return f"middle_block.{position}.{resnet_name(rest) if kind == 'resnets' else rest}"
    side, block, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    first = (int(block) * (layers + 1)) + (1 if side == "down" else 0)  # input block 0 is the first convolution
    blocks = {"down": "input_blocks", "up": "output_blocks"}[side]
    if kind == "resnets":
        return f"{blocks}.{first + int(index)}.0.{resnet_name(rest)}"
    if kind == "attentions":
        return f"{blocks}.{first + int(index)}.1.{rest}"
    if kind == "downsamplers":
        return f"{blocks}.{first + layers}.0.{rest.replace('conv', 'op', 1)}"
    return f"{blocks}.{first + layers}.{2 if int(block) in attention else 1}.{rest}"


def resnet_name(rest: str) -> str:
    layer, _, kind = rest.partition(".")
    return f"{RESNET[layer]}.{kind}"


def vae_name(name: str, blocks: int) -> str:
    """The name of a VAE tensor. blocks: of its encoder."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


def open_clip_text(tensors: dict, *, extra: int) -> dict:
    """A text tower with the names of OpenCLIP and its projection. extra: layers more, as Stable Diffusion 2 has one."""
    import torch

    named = {
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "text_projection": tensors.get("text_projection.weight", torch.eye(len(tensors["final_layer_norm.weight"]))).T,
        "logit_scale": torch.tensor(1.0),
    }
    named |= {f"ln_final.{kind}": tensors[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
    for i in range(count + extra):
        ours, theirs = f"encoder.layers.{min(i, count - 1)}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
            named |= {f"{theirs}.{new}.{kind}": tensors[f"{ours}.{old}.{kind}"] for old, new in OPEN_CLIP_LAYER.items()}
    return named


def make_single_file(checkpoint: Path, file: Path, *, text: str = "clip", half: bool = False) -> Path:
    """Write the pipeline in the folder `checkpoint` as one file. text: "clip" (SD 1), "open_clip" (SD 2) or "xl"."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    config = {part: json.loads((checkpoint / part / "config.json").read_text()) for part in ("unet", "vae")}
    attention = {i for i, kind in enumerate(config["unet"]["up_block_types"]) if "CrossAttn" in kind}
    layers, blocks = config["unet"]["layers_per_block"], len(config["vae"]["block_out_channels"])
    unet, vae, tower = (
        load_file(checkpoint / name)
        for name in (
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        )
    )
    tensors = {f"model.diffusion_model.{unet_name(name, layers, attention)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        theirs = vae_name(name, blocks)
        is_convolution = ".mid.attn_1." in theirs and tensor.ndim == 2  # 1x1 convolutions instead of linear layers
        tensors[f"first_stage_model.{theirs}"] = tensor[:, :, None, None] if is_convolution else tensor
    tower = {name.removeprefix("text_model."): tensor for name, tensor in tower.items()}
    if text == "clip":
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in tower.items()}
    elif text == "open_clip":
        second = open_clip_text(tower, extra=1)
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in second.items()}
    else:
        prefix = "conditioner.embedders.0.transformer.text_model."
        tensors |= {f"{prefix}{name}": tensor for name, tensor in tower.items()}
        larger = load_file(checkpoint / "text_encoder_2/model.safetensors")
        larger = {name.removeprefix("text_model."): tensor for name, tensor in larger.items()}
        second = open_clip_text(larger, extra=0)
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    assert len(tensors) >= len(unet) + len(vae) + 4  # names are distinct
    dtype = torch.float16 if half else torch.float32
    save_file({name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}, file)
    return file
