"""The estimated memory of an image, against the growth of a process that generates it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk import Bundle, BundleError
from unidiff_sdk._internal.memory import available_memory, readable_size
from unidiff_sdk.generation.generator import Generator

SCRIPT = """
import json, re, sys
from pathlib import Path
from unidiff_sdk import Bundle
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.generation.memory import image_memory

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

side, bundle = int(sys.argv[1]), Bundle.open("tiny", threads=1)
generator = Generator(bundle)
generator.generate("a red mug", steps=1)
before = peak()
generator.generate("a red mug", steps=1, width=side, height=side)
unet, decoder = bundle.config("unet/config.json"), bundle.config("vae_decoder/config.json")
print(json.dumps([peak() - before, image_memory(unet, decoder, side // 4, side // 4, 2)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("side", [256, 384])
def test_estimate_is_close_to_the_growth_and_rather_above(side: int) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(side)], capture_output=True, text=True, check=True)
    growth, estimated = json.loads(run.stdout)
    assert 0.9 * growth < estimated < 1.7 * growth


def test_available_memory_is_plausible() -> None:
    available = available_memory()
    assert available is None or 2**20 < available < 2**50


@pytest.mark.parametrize(("size", "expected"), [(3 * 2**20, "3 MiB"), (1.5e9, "1.4 GiB"), (2**41, "2,048.0 GiB")])
def test_readable_size(size: float, expected: str) -> None:
    assert readable_size(size) == expected
    assert readable_size(10**400).endswith("GiB")


@pytest.mark.parametrize("file", ["unet/config.json", "vae_decoder/config.json"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_out_channels", None),
        ("block_out_channels", 4),
        ("block_out_channels", []),
        ("block_out_channels", [4] * 17),
        ("block_out_channels", [4, "4"]),
        ("block_out_channels", [4, float("nan")]),
        ("block_out_channels", [10**30, 4]),
        ("block_out_channels", [0, -4]),
        ("down_block_types", [None]),
        ("down_block_types", 3),
        ("num_attention_heads", "8"),
        ("attention_head_dim", []),
        ("attention_head_dim", [8, {}]),
    ],
)
def test_generator_refuses_an_impossible_architecture(tmp_path: Path, file: str, name: str, value: Any) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    (folder / file).write_text(json.dumps({"block_out_channels": [4, 4], name: value}), encoding="utf-8")
    seal(folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    with pytest.raises(BundleError, match=rf"{file}: {name} is .*Export the bundle again"):
        Generator(Bundle.open(folder)).generate("a mug", n=1, steps=1)
