"""The VAE's latents of pictures, computed once; on disk, if wanted, for the next run as well.

    FOLDER/ab/abcdef….safetensors    one picture's latents, by the content of picture and VAE

So a changed picture or another VAE is another entry, never a wrong one; an entry that is damaged is made anew.
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

from .dataset_rows import empty_rows
from .images import Pictures

__all__ = ["LatentCache", "encode_latents"]

READ_AT_ONCE = 16  # pictures


@torch.no_grad()
def encode_latents(
    model: JointModel, images: Pictures, cache: LatentCache | None = None, *, scratch: Path | None = None
) -> Tensor:
    """n ≥ 1 pictures of side s -> float[n, c, s/f, s/f] on the CPU, scaled as the UNet sees them.

    One picture at a time: PyTorch's results depend on the batch in their last bits, and a picture's latents must be the
    same whichever others are encoded with it. scratch: a folder for those that do not fit in memory, see `rows`.
    Raises DataError where a folder cannot be written.
    """
    device = model.alpha_bar.device

    def encode(picture: Tensor) -> Tensor:
        return model.encode(picture.to(device).float() / 255).cpu()

    rows: Tensor | None = None
    pictures = (picture for chunk in images.split(READ_AT_ONCE) for picture in chunk.split(1))
    for number, picture in enumerate(pictures):
        latents = cache.read(picture) if cache else None
        if latents is None:
            latents = encode(picture)
            if cache:
                cache.write(picture, latents)
        if rows is None:
            rows = empty_rows(len(images), tuple(latents.shape[1:]), scratch)
        rows[number] = latents[0]
    assert rows is not None
    return rows


class LatentCache:
    """Latents on disk. folder: made if it is not there. model: whose VAE and device they are of."""

    def __init__(self, folder: Path, model: JointModel) -> None:
        self.folder = folder
        digest = hashlib.sha256(model.alpha_bar.device.type.encode())
        for name, tensor in model.vae.state_dict().items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        digest.update(repr((model.vae.config.scaling_factor, getattr(model.vae.config, "shift_factor", None))).encode())
        self._vae = digest.digest()

    def read(self, picture: Tensor) -> Tensor | None:
        """float[1, c, h, w] of uint8[1, 3, s, s]; None where there is no whole entry."""
        file = self._file(picture)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as entry:
                latents: Tensor = entry.get_tensor("latents")
                return latents if entry.metadata()["crc32"] == _crc32(latents) else None
        except (SafetensorError, OSError, KeyError, TypeError):  # cut off, overwritten, or of another program
            return None

    def write(self, picture: Tensor, latents: Tensor) -> None:
        """Add an entry; it appears whole or not at all. Raises DataError where the disk refuses."""
        file = self._file(picture)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save({"latents": latents.contiguous()}, metadata={"crc32": _crc32(latents)}))
            temporary.replace(file)
        except OSError as error:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise DataError(f"cannot keep latents in {self.folder}: {error}") from error

    def _file(self, picture: Tensor) -> Path:
        name = hashlib.sha256(self._vae + picture.numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _crc32(latents: Tensor) -> str:
    return f"{zlib.crc32(latents.contiguous().numpy().tobytes()):08x}"
