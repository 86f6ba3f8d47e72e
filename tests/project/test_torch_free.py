"""The runtime adds, searches and generates in a process that never imports PyTorch or what is built on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk.inference.bundle import TINY

HEAVY = ("torch", "transformers", "diffusers", "onnx", "pyarrow", "qdrant_client", "pydantic", "asyncio", "ssl")

SCRIPT = """
import json, sys
import numpy as np
from unidiff_sdk import Catalog

with Catalog(bundle=sys.argv[1]) as catalog:
    colors = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    images = [np.full((64, 64, 3), color, np.uint8) for color in colors.values()]
    catalog.add(images, [f"a {name} mug" for name in colors], payloads=[{"catalog": "ecommerce-product"}] * 2)
    page = catalog.search("a red mug", image=images[0])
    generation = catalog.generate("a red mug", n=2, seed=7, steps=2)
    catalog.add(generation)
    found = [len(page), len(generation), catalog.count(), generation[0].image.size[0]]
print(json.dumps({"found": found, "modules": sorted(sys.modules)}))
"""


@pytest.mark.parametrize("name", ["toy", "tiny"])
def test_no_torch_in_the_process(name: str, tmp_path: Path) -> None:
    bundle = TINY if name == "tiny" else make_toy_bundle(tmp_path / "bundle")
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(bundle)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["found"] == [2, 2, 4, 64 if name == "tiny" else 16]
    assert not set(HEAVY) & set(result["modules"])


def test_the_package_itself_imports_nothing() -> None:
    script = "import json, sys; import unidiff_sdk; print(json.dumps([*sys.modules]))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"numpy", "PIL", "onnxruntime", "qdrant_edge", "tokenizers", "rich", "click"}
    assert not heavy & set(json.loads(run.stdout))


def test_every_public_name_is_there() -> None:
    import unidiff_sdk

    for name in unidiff_sdk.__all__:
        assert getattr(unidiff_sdk, name) is not None
    assert set(unidiff_sdk.__all__) <= set(dir(unidiff_sdk))
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = unidiff_sdk.NoSuchName
