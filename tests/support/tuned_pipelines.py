"""Pipelines of diffusers from tuned checkpoints: what was trained, and images from given latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def changed_tensors(theirs: torch.nn.Module, ours: torch.nn.Module, untuned: torch.nn.Module) -> set[str]:
    """Names of the tensors of a part that differ from those of the base. The part must equal ours."""
    own, before, changed = ours.state_dict(), untuned.state_dict(), set()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, own[name]), name
        if not torch.equal(tensor, before[name]):
            changed.add(name)
    return changed


def generated_by(pipeline: Any, prompt: str, latents: np.ndarray, **options: Any) -> np.ndarray:
    """An image in four guided steps."""
    options |= {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": torch.from_numpy(latents)}
    return np.asarray(pipeline(prompt, **options).images[0])
