"""What re-ranking needs of an image and of no text: its latents, and its denoising errors without a text.

They may be stored next to the vectors of a catalog, one file for each image:

    latents-<fingerprint of the bundle>/3f/3fa9….bin

    magic, noise seed, shape and number of timesteps        "<8sQHHHH"
    timestep and error without a text, for each timestep    "<Id"
    latents                                                 "<f2" [channels, height, width]
    CRC-32 of all of it                                     "<I"

A file is named by the hash of its image and its folder by the bundle, so neither can be out of date. It can be computed
again from the image at any time: a missing or damaged file is never an error.
"""

from __future__ import annotations

import re
import shutil
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unidiff_sdk._internal.files import read_regular_file, resolve_stored, write_atomically
from unidiff_sdk._internal.memory import require_free_space
from unidiff_sdk.errors import StoreError

__all__ = ["ImageLatents", "LatentCache", "LatentStore"]

Float16 = npt.NDArray[np.float16]

CACHE_BYTES = 64 << 20
"""Memory for the latents that searches compute or read: of 32,000 images of the built-in model, or 2,000 of 512 px."""

_MAGIC = b"UDLATENT"
_HEADER, _ERROR, _CHECKSUM = struct.Struct("<8sQHHHH"), struct.Struct("<Id"), struct.Struct("<I")
_MAX_SIZE = 64 << 20  # bytes of a file; the latents of an image of 8192 px take 8 MiB
_FOLDER = re.compile(r"latents-[0-9a-f]{12}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class ImageLatents:
    """The latents of an image, and its denoising errors without a text.

    Attributes:
        latents: float16[channels, height, width]. Errors are measured with these rounded values, stored or not.
        errors: by timestep.
        noise_seed: the seed of the noise that the errors were measured with.
    """

    latents: Float16
    errors: Mapping[int, float]
    noise_seed: int

    @property
    def size(self) -> int:
        """Bytes in memory, without the overhead of Python objects."""
        return self.latents.nbytes + _ERROR.size * len(self.errors)

    def to_bytes(self) -> bytes:
        """The content of a file."""
        header = _HEADER.pack(_MAGIC, self.noise_seed, *self.latents.shape, len(self.errors))
        errors = b"".join(_ERROR.pack(timestep, error) for timestep, error in sorted(self.errors.items()))
        content = header + errors + self.latents.astype("<f2").tobytes()
        return content + _CHECKSUM.pack(zlib.crc32(content))

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageLatents:
        """Parse the content of a file. Raises ValueError, which says what is damaged."""
        try:
            magic, noise_seed, channels, height, width, count = _HEADER.unpack_from(data)
            start = _HEADER.size + _ERROR.size * count
            pairs = dict(_ERROR.iter_unpack(data[_HEADER.size : start]))
        except struct.error as error:
            raise ValueError(f"it has only {len(data)} bytes") from error
        size = start + 2 * channels * height * width + _CHECKSUM.size
        if magic != _MAGIC or len(data) != size:
            raise ValueError(f"it has {len(data)} bytes instead of {size}, or another format")
        content = data[: -_CHECKSUM.size]
        if _CHECKSUM.pack(zlib.crc32(content)) != data[-_CHECKSUM.size :]:
            raise ValueError("its checksum differs")
        latents = np.frombuffer(content, "<f2", offset=start).reshape(channels, height, width).astype(np.float16)
        if not (np.isfinite(latents).all() and np.isfinite(list(pairs.values())).all()):
            raise ValueError("it holds values that are not finite")
        return cls(latents, pairs, noise_seed)


class LatentStore:
    """The latents of one catalog by one bundle, in files. Safe to use from several threads and processes.

    Args:
        root: the folder of the catalog.
        fingerprint: of the bundle.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self._root, self._folder = root, f"latents-{fingerprint[:12]}"

    def read(self, sha256: str) -> ImageLatents | None:
        """The latents of the image with this hash; None if they are not stored. Raises ValueError if damaged."""
        try:
            path = self._path(sha256)
            if not path.is_file():
                return None
            return ImageLatents.from_bytes(read_regular_file(path, _MAX_SIZE, StoreError))
        except StoreError as error:
            raise ValueError(str(error)) from error

    def write(self, sha256: str, latents: ImageLatents) -> None:
        """Store latents, or replace stored ones. Raises StoreError."""
        content = latents.to_bytes()
        require_free_space(self._root, len(content), f"the latents of the image {sha256}")
        write_atomically(self._path(sha256), content)

    def remove(self, sha256: str) -> None:
        """Delete the latents of an image, if they are stored. Raises StoreError."""
        if _SHA256.fullmatch(sha256):
            self._path(sha256).unlink(missing_ok=True)

    def remove_others(self) -> None:
        """Delete the latents by other bundles, whose vectors the catalog has no longer."""
        for folder in self._root.glob("latents-*"):
            is_ours = _FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
            if is_ours and folder.name != self._folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise StoreError(f"{sha256!r:.200} is not the hash of an image: 64 hexadecimal digits. Index it again.")
        return resolve_stored(self._root, f"{self._folder}/{sha256[:2]}/{sha256}.bin", StoreError)


class LatentCache:
    """The latents that were used last, by the hash of their image. Safe to use from several threads.

    Args:
        max_bytes: above this size, the latents that were not used for the longest time are dropped.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._entries: OrderedDict[str, ImageLatents] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, sha256: str) -> ImageLatents | None:
        with self._lock:
            if sha256 in self._entries:
                self._entries.move_to_end(sha256)
            return self._entries.get(sha256)

    def put(self, sha256: str, latents: ImageLatents) -> None:
        with self._lock:
            old = self._entries.pop(sha256, None)
            self._bytes += latents.size - (old.size if old else 0)
            self._entries[sha256] = latents
            while self._bytes > self._max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.size

    @property
    def size(self) -> int:
        """Bytes of all latents."""
        return self._bytes
