"""Training on shards in object storage, through fsspec's file system in memory."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the train extra")
fsspec = pytest.importorskip("fsspec")

from unidiff_sdk.errors import DataError, OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.cli import train as command  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.remote import local_data  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402


@pytest.fixture
def shards(small_catalog: Path, tmp_path: Path) -> tuple[Path, str]:
    """The small catalog as two shards: in a folder, and in object storage."""
    rows = [json.loads(line) for line in (small_catalog / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    folder, root = tmp_path / "shards", f"/{uuid.uuid4().hex}/products"
    folder.mkdir()
    for number in (0, 1):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in rows[number::2]:
                stem = f"{int(Path(row['file_name']).stem):03d}"
                image = (small_catalog / row["file_name"]).read_bytes()
                for name, content in ((f"{stem}.png", image), (f"{stem}.txt", row["text"].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        fsspec.filesystem("memory").pipe_file(f"{root}/{number}.tar", (folder / f"{number}.tar").read_bytes())
    return folder, f"memory:/{root}"


def test_run_on_shards_in_object_storage_is_that_on_local_ones(
    shards: tuple[Path, str], random_checkpoint: Path, tmp_path: Path
) -> None:
    """Through the function and the command."""
    folder, url = shards
    config = TrainingConfig(steps=2, batch_size=4)
    outs = [tmp_path / name for name in ("local", "remote", "command")]
    train(folder, random_checkpoint, outs[0], config, device="cpu")
    train(url, random_checkpoint, outs[1], config, device="cpu")
    options = ["--base", random_checkpoint, "-o", outs[2], "--copies", tmp_path / "copies"]
    few = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]
    result = CliRunner().invoke(command, list(map(str, [url, *options, *few])))
    assert result.exit_code == 0 and "on 12 pairs" in result.output, result.output
    local, *others = (load_checkpoint(out).unet.state_dict() for out in outs)
    assert all(torch.equal(local[name], other[name]) for other in others for name in local)
    assert json.loads((outs[1] / "unidiff.json").read_text(encoding="utf-8"))["data"]["name"] == "products"
    copies = [
        sorted(file.name for file in place.rglob("*.tar")) for place in (tmp_path / "remote.data", tmp_path / "copies")
    ]
    assert copies == [["0.tar", "1.tar"]] * 2


def test_folder_for_copies_of_local_data_is_refused(small_catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="copies has no effect"):
        local_data(small_catalog, tmp_path / "out", tmp_path / "copies")


def test_url_without_shards_is_a_data_error(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no files"):
        train(f"memory://{uuid.uuid4().hex}", random_checkpoint, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())
