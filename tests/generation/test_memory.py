"""The estimated memory of an image, against the growth of a process that generates it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from unidiff_sdk._internal.memory import available_memory, readable_size

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
