"""A bundle: the folder of ONNX graphs that `unidiff-export` wrote, its manifest, and the checks that it is whole."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import BundleError, OptionError

from .diffusers_folder import PIPELINE, AdaptedSession, derive_manifest, is_pipeline
from .schedule import Schedule
from .sessions import DEVICES, create_session
from .shape_profiles import Profile, shape_profile

if TYPE_CHECKING:
    from unidiff_sdk._internal.images import Fit

    from .warmup import GraphWarmup

__all__ = ["FORMAT", "SCHEMA_VERSION", "TINY", "Bundle", "file_sha256", "fingerprint_of", "manifest_checksum"]

FORMAT = "unidiff-bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TINY = Path(__file__).parents[1] / "models" / "tiny"
"""The default bundle, which comes with the package."""

# What the runtime reads from a manifest, and of what type it must be. `float` takes integers too.
_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "precision": str,
    "graphs": dict,
    "files": dict,
    "fingerprint": str,
    "embedding.dim": int,
    "embedding.max_tokens": int,
    "image.size": int,
    "image.mean": list,
    "image.std": list,
    "latent.channels": int,
    "latent.size": int,
    "latent.scale_factor": int,
    "latent.scaling_factor": (int, float),
    "latent.shift_factor": (int, float),
    "sampler.name": str,
    "sampler.steps": int,
    "sampler.guidance_scale": (int, float),
}


class Bundle:
    """An opened bundle. Its graphs load when they are first used, each once; it may be shared between threads.

    Attributes:
        path: the folder.
        manifest: what `manifest.json` says.
        device: where the graphs run: "cpu", "cuda" or "tensorrt".
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        device: str = "cpu",
        threads: int | None = None,
        capture: bool = False,
    ) -> None:
        if device not in DEVICES:
            raise OptionError(f"device {device!r} is not known; use one of {', '.join(DEVICES)}")
        made_for = manifest.get("devices", DEVICES)
        if device not in made_for:
            raise BundleError(
                f"{path} was exported for {manifest.get('target')}, which runs on {' and '.join(made_for)}; for device "
                f"{device!r} make another: unidiff-export CKPT -o BUNDLE --target {device}"
            )
        self.path = path
        self.manifest = manifest
        self.device = device
        self._threads = threads
        self._capture = capture
        self._derived = manifest["format"] == PIPELINE
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        verify: bool = True,
        device: str = "cpu",
        threads: int | None = None,
        capture: bool = False,
    ) -> Bundle:
        """Open a bundle folder, or one that optimum exported from Stable Diffusion, which can only generate.

        Args:
            path: the folder; None or "tiny" is the default bundle that comes with the package.
            verify: compare the SHA-256 of every file with the manifest's (about a second for each 1.5 GB).
            device: "cpu", "cuda" or "tensorrt".
            threads: how many threads one call uses on the CPU; by default one for each core.
            capture: with "cuda", replay calls of the usual shapes (see `profile`) from a CUDA graph, for the graphs
                that run on the GPU alone; `warmup` says which.

        Raises:
            BundleError: the folder is not a bundle, is incomplete, was changed after its export, or was exported for
                a target that `device` cannot run.
            OptionError: `device` is not known.
        """
        folder = TINY if path is None or path == "tiny" else Path(path)
        if not (folder / MANIFEST).is_file() and is_pipeline(folder):
            return cls(folder, _derived_manifest(folder), device=device, threads=threads, capture=capture)
        manifest = _read_manifest(folder)
        _check_schema(folder, manifest)
        _check_files(folder, manifest["files"], verify)
        if fingerprint_of(manifest["files"]) != manifest["fingerprint"]:
            raise BundleError(
                f"{folder / MANIFEST}: the fingerprint does not fit its list of files; export the bundle again"
            )
        return cls(folder, manifest, device=device, threads=threads, capture=capture)

    def session(self, graph: str) -> Any:
        """The ONNX Runtime session of a graph, such as "unet"; loaded on first use.

        Raises:
            BundleError: the bundle has no such graph, or it cannot be loaded.
            ProviderError: ONNX Runtime or the device is not usable.
        """
        with self._lock:
            if graph not in self._sessions:
                described = self._graph(graph)
                session = create_session(
                    self.path / described["file"],
                    device=self.device,
                    threads=self._threads,
                    profile=self.profile(graph),
                    half=described.get("precision") == "fp16",
                    fingerprint=self.fingerprint,
                    capture=self._capture,
                )
                self._sessions[graph] = AdaptedSession(session) if self._derived else session
            return self._sessions[graph]

    def warmup(self, progress: Callable[[str], None] | None = None) -> list[GraphWarmup]:
        """Load every graph and call it twice at its usual shapes: what the first search and picture need not wait for.

        With TensorRT this builds the engines, which takes minutes the first time; they are then kept in the user's
        cache folder, for these versions and this bundle. `progress` is called with one line before each graph.

        Raises:
            BundleError: a graph cannot be loaded, or the manifest does not say its shapes.
            ProviderError: ONNX Runtime or the device is not usable.
        """
        from .warmup import warm_up

        return warm_up(self, progress or (lambda line: None))

    def profile(self, graph: str) -> Profile | None:
        """For each input of a graph its smallest, usual and largest shape ("min", "opt", "max"), if they are known."""
        described = self._graph(graph)
        if "profile" in described:
            return cast(Profile, described["profile"])
        return shape_profile(graph, described["inputs"], self.manifest) if "inputs" in described else None

    def has_graph(self, graph: str) -> bool:
        """Whether the bundle holds a graph of that name."""
        return graph in self.manifest["graphs"]

    def config(self, file: str) -> dict[str, Any]:
        """A JSON file of the bundle, such as "unet/config.json".

        Raises:
            BundleError: it is missing or is not JSON.
        """
        return _read_json(self.path / file)

    def schedule(self) -> Schedule:
        """The noise schedule that the UNet was trained with."""
        return Schedule.from_config(self.config("scheduler/scheduler_config.json"))

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change whenever a graph, a tokenizer or a configuration file does."""
        return str(self.manifest["fingerprint"])

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def precision(self) -> str:
        """What the weights are stored and computed in: "fp32", "fp16" or "int8"."""
        return str(self.manifest["precision"])

    @property
    def synthetic(self) -> bool:
        """Whether the model has only ever seen drawn pictures, and so knows nothing of photographs."""
        return bool(self.manifest.get("synthetic", False))

    @property
    def dim(self) -> int:
        """The length of an embedding."""
        return int(self._of_search("embedding")["dim"])

    @property
    def logit_scale(self) -> float:
        """What a cosine was multiplied by in contrastive training to become a logit: the inverse temperature."""
        return float(self._of_search("embedding")["logit_scale"])

    @property
    def max_tokens(self) -> int:
        """The length, in tokens, that texts are padded or cut to for search."""
        return int(self._of_search("embedding")["max_tokens"])

    @property
    def prompt_tokens(self) -> int:
        """The length, in tokens, that prompts are padded or cut to; another than `max_tokens` only where the
        generator has a text encoder of its own."""
        return int((self.manifest.get("prompt") or self.manifest["embedding"])["max_tokens"])

    @property
    def image_size(self) -> int:
        """The side, in pixels, of the square that the image encoder sees."""
        return int(self._of_search("image")["size"])

    @property
    def image_fit(self) -> Fit:
        """How the model's pictures were made square in training: "crop" where the manifest does not say."""
        fit: Fit = self.manifest.get("image", {}).get("fit", "crop")
        return fit

    @property
    def image_mean(self) -> NDArray[np.float32]:
        """What is subtracted from each channel in [0, 1]: float32[3]."""
        return np.asarray(self._of_search("image")["mean"], np.float32)

    @property
    def image_std(self) -> NDArray[np.float32]:
        """What each channel is then divided by: float32[3]."""
        return np.asarray(self._of_search("image")["std"], np.float32)

    def __repr__(self) -> str:
        searches = "generation only" if self._derived else f"{self.dim}-dimensional"
        return (
            f"Bundle({self.name!r}, {self.precision}, {searches}, device={self.device!r}, "
            f"fingerprint={self.fingerprint[:12]}…, path={str(self.path)!r})"
        )

    def _of_search(self, section: str) -> dict[str, Any]:
        """A section of the manifest that only a bundle with CLIP's towers has."""
        if self._derived:
            raise BundleError(
                f"{self.path} holds a Stable Diffusion without CLIP: it generates, but cannot search, rank or index. "
                "Export both together: unidiff-export CKPT -o BUNDLE"
            )
        return cast(dict[str, Any], self.manifest[section])

    def _graph(self, graph: str) -> dict[str, Any]:
        graphs: dict[str, dict[str, Any]] = self.manifest["graphs"]
        if graph not in graphs:
            raise BundleError(f"{self.path}: has no graph {graph!r}; it holds {', '.join(sorted(graphs))}")
        return graphs[graph]


# Shared with the export, so that both sides mean the same


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_of(files: Mapping[str, str]) -> str:
    """A bundle's fingerprint from its files' hashes: the SHA-256 of the map as compact JSON with sorted keys."""
    return hashlib.sha256(_canonical(files)).hexdigest()


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its own "checksum", as compact JSON with sorted keys."""
    return hashlib.sha256(_canonical({key: value for key, value in manifest.items() if key != "checksum"})).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# Checks


def _read_manifest(folder: Path) -> dict[str, Any]:
    if (folder / MANIFEST).is_file():
        return _read_json(folder / MANIFEST)
    if folder == TINY:
        raise BundleError(
            f"the default bundle is missing from this installation ({folder}); reinstall, or give a bundle"
        )
    if not folder.is_dir():
        raise BundleError(f"{folder}: there is no such folder; give the folder that unidiff-export wrote, or 'tiny'")
    if (folder / "unidiff.json").is_file():
        raise BundleError(f"{folder}: is a training checkpoint; make a bundle of it: unidiff-export {folder} -o BUNDLE")
    raise BundleError(f"{folder}: is not a bundle, as it has no {MANIFEST}; give the folder that unidiff-export wrote")


def _derived_manifest(folder: Path) -> dict[str, Any]:
    """That of a folder which optimum exported; its fingerprint is of the files as they are found."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    return derive_manifest(folder) | {"files": hashes, "fingerprint": fingerprint_of(hashes)}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{file}: is missing; export the bundle again") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def _check_schema(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / MANIFEST
    if manifest.get("format") != FORMAT:
        raise BundleError(f'{file}: "format" is {manifest.get("format")!r}, not {FORMAT!r}; this is not a bundle')
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "upgrade unidiff-sdk" if newer else "export it again"
        raise BundleError(f"{file}: schema_version is {version!r}, this SDK reads {SCHEMA_VERSION}; {remedy}")
    if "checksum" in manifest and manifest_checksum(manifest) != manifest["checksum"]:
        raise BundleError(f"{file}: was changed after the export (its checksum differs); export the bundle again")
    for key, expected in _SCHEMA.items():
        value: Any = manifest
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        names = " or ".join(kind.__name__ for kind in (expected if isinstance(expected, tuple) else (expected,)))
        if not isinstance(value, expected) or isinstance(value, bool):
            raise BundleError(f"{file}: {key} must be {names}, but is {value!r}")
        if isinstance(value, (int, float)) and key != "latent.shift_factor" and not 0 < value < float("inf"):
            raise BundleError(f"{file}: {key} must be positive, but is {value!r}")
    for key in ("mean", "std"):
        values = manifest["image"][key]
        if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
            raise BundleError(f"{file}: image.{key} must be 3 numbers, but is {values!r}")
    if manifest["image"].get("fit", "crop") not in ("crop", "pad"):
        raise BundleError(f"{file}: image.fit must be crop or pad, but is {manifest['image']['fit']!r}")
    for name, graph in manifest["graphs"].items():
        if not isinstance(graph, dict) or graph.get("file") not in manifest["files"]:
            raise BundleError(f"{file}: graph {name!r} names no file of the bundle")


def _check_files(folder: Path, files: dict[str, Any], verify: bool) -> None:
    for name, expected in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise BundleError(f"{folder / MANIFEST}: {name!r} points outside the bundle")
        file = folder / relative
        if not file.is_file():
            raise BundleError(f"{file}: is missing; copy the whole folder, or export the bundle again")
        if verify and file_sha256(file) != expected:
            raise BundleError(f"{file}: was changed after the export (its SHA-256 differs); export the bundle again")
