"""Training on images that are stored in a table."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the train extra")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from unidiff_sdk.datasets.reader import SpooledImage  # noqa: E402
from unidiff_sdk.errors import DataError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(9)]
    file = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": images, "text": [f"item {n}" for n in range(9)]}), file)
    return file


def test_images_of_a_table_are_not_kept_in_memory(random_checkpoint: Path, table: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    in_memory, spooled = (load_pairs(table, checkpoint, memory_limit=limit) for limit in (1 << 30, 0))
    assert all(isinstance(row.source, SpooledImage) for row in spooled.images.rows)
    assert [row.image() for row in spooled.images.rows] == [png(n) for n in range(9)]
    assert in_memory.sha256 == spooled.sha256
    for order in ([8, 0, 3], list(range(9))):
        assert torch.equal(in_memory.images[torch.tensor(order)], spooled.images[torch.tensor(order)])


def test_a_full_disk_is_a_data_error(random_checkpoint: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(DataError, match="Free space there, or set TMPDIR"):
        load_pairs(table, load_checkpoint(random_checkpoint))
