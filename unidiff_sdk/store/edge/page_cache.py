"""Reading a shard's files into the operating system's page cache before the engine opens them."""

from __future__ import annotations

from pathlib import Path

from unidiff_sdk._internal.memory import available_memory

from .quantization import stored_quantization

__all__ = ["warm_page_cache"]

_CHUNK = 1 << 20  # bytes


def warm_page_cache(shard: Path, available: int | None = None) -> None:
    """Read a shard's segments from end to end, so that the first searches need not wait for the disk.

    A quantized shard is skipped, because its originals are meant to stay on disk. So is a shard that is larger than
    the available memory.

    Args:
        shard: the shard's folder.
        available: bytes of memory that may be used. Default: what the operating system reports.
    """
    files = [file for file in (shard / "segments").rglob("*") if file.is_file()]
    room = available_memory() if available is None else available
    if stored_quantization(shard) or room is None or sum(file.stat().st_size for file in files) > room:
        return
    buffer = bytearray(_CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
