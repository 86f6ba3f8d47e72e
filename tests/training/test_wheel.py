"""Training from the built wheel, in an environment that does not contain the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel installed, and the dependencies of the running environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    # Paths in a .pth file are added without processing the .pth files there, such as that of an editable install.
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n", encoding="utf-8")
    return folder / "venv"


def run(*command: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_tiny_base_trains_from_the_wheel(environment: Path, small_catalog: Path, tmp_path: Path) -> None:
    where = run(environment / "bin" / "python", "-c", "import unidiff_sdk; print(unidiff_sdk.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment), "not the source tree"
    options = ["--base", "tiny", "-o", "run", "--steps", 2, "--batch-size", 4, "--device", "cpu"]
    output = run(environment / "bin" / "unidiff-train", small_catalog, *options, cwd=tmp_path)
    assert "Trained 2 steps on 12 pairs" in output
    meta = json.loads((tmp_path / "run" / "unidiff.json").read_text(encoding="utf-8"))
    assert (meta["base"], meta["step"]) == ("tiny", 2)
    evaluate = ["run", small_catalog, "--prompts", 2, "--per-prompt", 1, "--steps", 2, "--json", "figures.json"]
    run(environment / "bin" / "unidiff-evaluate", *evaluate, cwd=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert "kid" in figures["generation"], "the judge is in the wheel too"
