"""VAE latents of images, computed once per run, and optionally kept on disk for later runs.

    FOLDER/ab/abcdef….safetensors    latents of one image, named by its content, its size and the VAE

A changed image or VAE has another entry, never a wrong one. A damaged entry is computed again.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unidiff_sdk.errors import DataError
from unidiff_sdk.training.objective.joint_model import JointModel

from .fitted_images import FittedImages
from .mapped_tensor import MEMORY_LIMIT, allocate_rows

__all__ = ["LatentCache", "encode_latents"]

CHUNK = 16  # images read at a time


@torch.no_grad()
def encode_latents(
    model: JointModel,
    images: FittedImages,
    cache: LatentCache | None = None,
    *,
    scratch: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Tensor:
    """Encode n ≥ 1 images of one size: float[n, c, h/f, w/f] on the CPU, scaled as the UNet expects.

    Images are encoded one at a time. The last bits of PyTorch's results depend on the batch, and the latents of an
    image must not depend on the other images.

    scratch, memory_limit: see `allocate_rows`. Raises DataError if a folder cannot be written.
    """
    rows: Tensor | None = None
    singles = (image for chunk in images.split(CHUNK) for image in chunk.split(1))
    for number, image in enumerate(singles):
        latents = cache.read(image) if cache else None
        if latents is None:
            latents = model.encode(image.to(model.device).float() / 255).cpu()
            if cache:
                cache.write(image, latents)
        if rows is None:
            rows = allocate_rows(len(images), tuple(latents.shape[1:]), scratch, memory_limit=memory_limit)
        rows[number] = latents[0]
    assert rows is not None
    return rows


class LatentCache:
    """Latents on disk.

    Args:
        folder: Folder of the entries. Created if missing.
        model: Provides the VAE and the device that the entries belong to.
    """

    def __init__(self, folder: Path, model: JointModel) -> None:
        self.folder = folder
        digest = hashlib.sha256(model.device.type.encode())
        for name, tensor in model.vae.state_dict().items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        digest.update(repr(model.vae.config.scaling_factor).encode())
        if model.latent_shift:
            digest.update(repr(model.latent_shift).encode())
        self._vae = digest.digest()

    def read(self, image: Tensor) -> Tensor | None:
        """Latents, float[1, c, h, w], of uint8[1, 3, height, width]. None if there is no complete entry."""
        file = self._file(image)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as entry:
                latents: Tensor = entry.get_tensor("latents")
                return latents if entry.metadata()["crc32"] == _crc32(latents) else None
        except (SafetensorError, OSError, KeyError, TypeError):  # truncated, overwritten, or written by something else
            return None

    def write(self, image: Tensor, latents: Tensor) -> None:
        """Add an entry. It appears complete or not at all. Raises DataError if it cannot be written."""
        file = self._file(image)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save({"latents": latents.contiguous()}, metadata={"crc32": _crc32(latents)}))
            temporary.replace(file)
        except OSError as error:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise DataError(f"Cannot write latents to {self.folder}: {error}. Choose another --latents.") from error

    def _file(self, image: Tensor) -> Path:
        # Images of one color have the same bytes at 64 x 32 and at 32 x 64 pixels.
        size = repr(tuple(image.shape)).encode()
        name = hashlib.sha256(self._vae + size + image.numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _crc32(latents: Tensor) -> str:
    return f"{zlib.crc32(latents.contiguous().numpy().tobytes()):08x}"
