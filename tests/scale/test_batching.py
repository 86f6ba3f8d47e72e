"""How many images are encoded at once, by the rule in closed form and by allocations of known size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import local_ray

from unidiff_sdk._internal.memory import peak_memory
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.scale import batching, index
from unidiff_sdk.scale.batching import BatchSize, images_at_once

GB = 10**9


@pytest.mark.parametrize(
    ("free", "processes", "image_bytes", "expected"),
    [
        (16 * GB, 4, 0.1 * GB, 20),  # 16 / 2 / 4 / 0.1
        (16 * GB, 1, 0.1 * GB, 64),  # 80 fit, and a chunk has 64
        (2 * GB, 8, 0.1 * GB, 1),  # 1.25
        (GB, 8, 0.1 * GB, 1),  # not even one fits
        (16 * GB, 3, 0.1 * GB, 26),  # 26.7
    ],
)
def test_rule(free: int, processes: int, image_bytes: float, expected: int) -> None:
    assert images_at_once(free, processes, image_bytes) == expected


def test_growth_is_that_of_the_block() -> None:
    earlier = np.ones(600 << 20, np.uint8)  # a higher peak before it does not count
    del earlier
    with peak_memory() as peak:
        some = np.ones(300 << 20, np.uint8)
        del some
    if peak.growth is None:
        pytest.skip("needs /proc")
    # Allocators of packages that earlier tests used return some of their memory meanwhile, in threads of their own.
    assert 250 << 20 < peak.growth < 350 << 20


def test_size_follows_from_the_measured_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with peak_memory() as peak:
        pass
    if peak.growth is None:
        pytest.skip("needs /proc")
    monkeypatch.setattr(batching, "available_memory", lambda: 2000 << 20)
    size = BatchSize(None, processes=2)
    sizes = [size.size]
    for images, allocated in ((1, 500), (3, 500), (4, 150), (10, 500)):  # MiB; three images are too few to measure
        with size.measured(images, pixel_bytes=0):
            memory = np.ones(allocated << 20, np.uint8)
            del memory
        sizes.append(size.size)
    assert sizes[:3] == [1, 4, 4] and sizes[3] == sizes[4]
    assert 9 <= sizes[3] <= 11  # 50 MiB an image: (2000 + 150) / 2 / 2 / 50 is 10.75


@pytest.mark.parametrize("batch_size", [5, 64, None])
def test_no_batch_is_larger_than_the_size(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    local_ray.use(monkeypatch)
    plain, sizes = Encoder.encode_pixels, []

    def counted(encoder: Encoder, pixels: NDArray[np.float32]) -> Any:
        sizes.append(len(pixels))
        return plain(encoder, pixels)

    monkeypatch.setattr(Encoder, "encode_pixels", counted)
    # The toy bundle takes no memory that could be measured, so what is measured is set.
    monkeypatch.setattr(batching, "images_at_once", lambda free, processes, image_bytes: images_at_once(1, 1, 1 << 20))
    report = index(small_catalog, tmp_path / "shop", toy, batch_size=batch_size, record=tmp_path / "run.jsonl")
    assert report.added == 12
    assert sizes == {5: [5, 5, 2], 64: [12], None: [1, 4, *[1] * 7]}[batch_size]
