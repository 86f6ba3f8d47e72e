"""LoRA files with random weights, in the formats that are in circulation, written by diffusers and peft or by hand."""

from __future__ import annotations

from pathlib import Path

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def make_lora(checkpoint: Path, file: Path, *, form: str = "kohya", text: bool = True, seed: int = 0) -> dict:
    """Write a LoRA of rank 3 for the pipeline in `checkpoint`, and return what it adds to the weights at weight 1.

    form: "kohya", "peft" (as `save_lora_weights` writes it, with its metadata), or "diffusers" (its older keys).
    Returns tensors by (part, name of the weight).
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from safetensors.torch import save_file

    is_sd3 = (checkpoint / "transformer").is_dir()
    pipeline = DiffusionPipeline.from_pretrained(
        checkpoint, **({"text_encoder_3": None, "tokenizer_3": None} if is_sd3 else {})
    )
    has_second = hasattr(pipeline, "text_encoder_2")
    denoiser = "transformer" if is_sd3 else "unet"
    prefixes = {denoiser: "lora_unet_", "text_encoder": "lora_te1_" if has_second else "lora_te_"}
    prefixes |= {"text_encoder_2": "lora_te2_"} if has_second else {}
    generator = torch.Generator().manual_seed(seed)
    rank, alphas = 3, {"kohya": 2.0, "peft": 6.0, "diffusers": 3.0}
    scale = alphas[form] / rank
    changes, tensors = {}, {}
    for part in prefixes:
        names = UNET_LAYERS if part == denoiser else TEXT_LAYERS if text else ()
        for layer, module in getattr(pipeline, part).named_modules():
            if not layer.endswith(names) or not names:
                continue
            out_size, in_size = module.weight.shape
            down = 0.3 * torch.randn(rank, in_size, generator=generator)
            up = 0.3 * torch.randn(out_size, rank, generator=generator)
            changes[part, f"{layer}.weight"] = scale * up @ down
            published = layer if part == denoiser or layer.startswith("text_model.") else f"text_model.{layer}"
            if form == "kohya":
                if has_second and part == "unet":
                    published = _by_original_blocks(published)
                prefix = prefixes[part] + published.replace(".", "_")
                tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
                tensors[f"{prefix}.alpha"] = torch.tensor(alphas[form])
            else:
                tensors |= {f"{part}.{published}.lora_A.weight": down, f"{part}.{published}.lora_B.weight": up}
    if form == "peft":
        _save_with_metadata(pipeline, tensors, file, rank, alphas[form])
        return changes
    if form == "diffusers":
        # The UNet of older files has the keys of attention processors, the text encoder those of linear layers.
        own = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder.")}
        old = convert_state_dict_to_diffusers(own) if own else {}
        names = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
        for key in tensors.keys() - own.keys():
            kind = next(name for name in names if name in key)
            old[key.replace(kind, names[kind])] = tensors[key]
        tensors = old
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return changes


def _by_original_blocks(layer: str) -> str:
    """The name of a layer of a UNet with one block on each side, by the blocks of the original repository."""
    block, rest = layer.split(".attentions.")
    attention, rest = rest.split(".", 1)
    own = {"down_blocks.0": "input_blocks.1.1", "mid_block": "middle_block.1"}
    return f"{own.get(block, f'output_blocks.{attention}.1')}.{rest}"


def _save_with_metadata(pipeline, tensors: dict, file: Path, rank: int, alpha: float) -> None:
    """As diffusers saves the adapter of a training: alpha is in the metadata."""
    from peft import LoraConfig

    layers = {
        part: {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}
        for part in ("unet", "transformer", "text_encoder", "text_encoder_2")
    }
    saved = {}
    for part, own in layers.items():
        if own:
            names = TEXT_LAYERS if part.startswith("text") else UNET_LAYERS
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names))
            saved |= {f"{part}_lora_layers": own, f"{part}_lora_adapter_metadata": config.to_dict()}
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **saved)
