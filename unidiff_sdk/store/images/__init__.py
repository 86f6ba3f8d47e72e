"""Images by content hash in one folder, and the check that the folder and the stored items agree."""

from .image_store import THUMBNAIL_SIZE, ImageStore, ItemImage

__all__ = ["THUMBNAIL_SIZE", "ImageStore", "ItemImage"]
