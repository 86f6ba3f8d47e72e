"""Images by content hash, in a folder or in object storage, and the check that they and the stored items agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .image_store import THUMBNAIL_SIZE, ImageStore, ItemImage

if TYPE_CHECKING:
    from .object_storage import ObjectStorage

__all__ = ["THUMBNAIL_SIZE", "ImageStore", "ItemImage", "open_images"]


def open_images(folder: Path, storage: ObjectStorage | None, references: Path | None = None) -> ImageStore:
    """The image store of a catalog: in object storage, or in its folder.

    Raises:
        OptionError: the storage cannot be opened, or `references` is given with it.
        StoreError: a package for the storage is missing.
    """
    from unidiff_sdk.errors import OptionError

    if storage is None:
        return ImageStore(folder, references)
    if references is not None:
        raise OptionError(f"references= is for images in a folder, and these are in {storage.url}. Omit it.")
    from .remote_images import RemoteImageStore

    return RemoteImageStore(folder, storage)
