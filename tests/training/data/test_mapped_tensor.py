"""Tensors larger than memory: mapped to a file, equal to those in memory, and an error if the disk is too small."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import DataError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.batches import BatchLoader  # noqa: E402
from unidiff_sdk.training.data.captions import group_keys, tokenize  # noqa: E402
from unidiff_sdk.training.data.latents import encode_latents  # noqa: E402
from unidiff_sdk.training.data.mapped_tensor import allocate_rows  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402


def test_latents_in_a_file_equal_those_in_memory(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model, images = JointModel(checkpoint), load_pairs(small_catalog, checkpoint).images
    in_memory = encode_latents(model, images, scratch=tmp_path)
    mapped = encode_latents(model, images, scratch=tmp_path / "new folder", memory_limit=0)
    assert torch.equal(mapped, in_memory)
    assert list((tmp_path / "new folder").iterdir()) == [], "the file has no name"


def test_batches_from_a_file_equal_those_from_memory(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model, pairs = JointModel(checkpoint), load_pairs(small_catalog, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    options = {"size": 6, "flip": True, "seed": 0, "feature_distillation": True, "scratch": tmp_path}
    in_memory = BatchLoader(model, pairs, ids, group_keys(pairs), **options)
    mapped = BatchLoader(model, pairs, ids, group_keys(pairs), **options, memory_limit=0)
    for step in range(3):
        a, b = (loader.load(loader.indices(step), 4) for loader in (in_memory, mapped))
        assert torch.equal(a.latents, b.latents) and torch.equal(a.clip_pixels, b.clip_pixels)
        assert a.base_embeddings.keys() == b.base_embeddings.keys() == {"u", "v"}
        assert all(torch.equal(a.base_embeddings[name], b.base_embeddings[name]) for name in ("u", "v"))


def test_disk_that_is_too_small_is_an_error_at_once(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DataError, match=r"Cannot store 0\.0 GB in .*too large for memory"):
            allocate_rows(1 << 20, (4,), tmp_path, memory_limit=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BEYOND = """
import re, resource, sys, torch
from pathlib import Path
from unidiff_sdk.training.data.mapped_tensor import allocate_rows

data = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (data + (64 << 20), resource.RLIM_INFINITY))  # 64 MiB more than now
shape = (1 << 20, (64,))  # 256 MiB
try:
    allocate_rows(*shape, Path(sys.argv[1]))
except RuntimeError:
    mapped = allocate_rows(*shape, Path(sys.argv[1]), memory_limit=128 << 20)
    mapped[::4096] = torch.arange(256.0)[:, None]
    assert mapped[4096 * 255].eq(255).all() and mapped.shape == (1 << 20, 64)
    print("larger than memory")
"""


def test_tensor_larger_than_the_memory_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BEYOND, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "larger than memory\n", done.stderr
    assert list(tmp_path.iterdir()) == []
