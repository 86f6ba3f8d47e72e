"""Models in one safetensors file, read by the loaders of diffusers with configuration files of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from unidiff_sdk.errors import CheckpointError

__all__ = ["load_vae_file"]


def load_vae_file(file: Path, config: Path) -> AutoencoderKL:
    """Load a VAE, in float32 and eval mode, from a file with the keys of diffusers or of the original repository.

    Args:
        file: A safetensors file.
        config: Folder with the config.json of a VAE of the same shape.

    Raises:
        CheckpointError: The file cannot be read, or does not hold the VAE that the configuration describes.
    """
    try:
        vae: Any = AutoencoderKL.from_single_file(str(file), config=str(config), local_files_only=True)
    except NotImplementedError as error:  # diffusers moves tensors that have no values
        raise CheckpointError(f"{file} lacks tensors of the VAE that {config} describes.") from error
    except Exception as error:  # the loaders raise any error of their parsers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is not a VAE like the base's: {reason}") from error
    return vae.float().eval()  # type: ignore[no-any-return]
