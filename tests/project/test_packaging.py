"""What a wheel holds, and that the lock and the ranges agree."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Nothing that `make test` installs needs these, so the lock does not hold them.
UNLOCKED_EXTRAS = {"gpu", "trt", "openclip", "optimum", "s3", "gcs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl"))).namelist()


def test_both_packages_are_top_level_and_typed(wheel: list[str]) -> None:
    assert {"unidiff_sdk/py.typed", "unidiff_export/py.typed", "unidiff_sdk/catalog/catalog.py"} <= set(wheel)
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"unidiff_sdk", "unidiff_export"}


def test_a_wheel_holds_the_built_in_model_and_its_base(wheel: list[str]) -> None:
    assert "unidiff_sdk/models/tiny/manifest.json" in wheel
    assert "unidiff_sdk/training/recipes/tiny_checkpoint/unidiff.json" in wheel


def test_a_wheel_holds_the_page_of_a_site_once_it_is_built(wheel: list[str]) -> None:
    page = ROOT / "unidiff_sdk/cli/servers/site/page"
    built = {path.relative_to(ROOT).as_posix() for path in page.rglob("*") if path.is_file()}
    assert {name for name in wheel if "/site/page/" in name} == built
    assert not [name for name in wheel if "node_modules" in name or name.endswith(".ts")]


def test_console_scripts_exist() -> None:
    pytest.importorskip("torch")
    for target in PROJECT["scripts"].values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_the_lock_satisfies_every_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = {name: needs for name, needs in PROJECT["optional-dependencies"].items() if name not in UNLOCKED_EXTRAS}
    for need in map(Requirement, [*PROJECT["dependencies"], *(need for needs in extras.values() for need in needs)]):
        name = canonicalize_name(need.name)
        if name != PROJECT["name"]:
            assert need.specifier.contains(Version(locked[name])), f"{name} {locked[name]} is outside {need.specifier}"
