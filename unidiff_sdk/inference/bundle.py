"""A bundle: a folder of ONNX graphs that `unidiff-export` wrote, and its manifest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.files import checked_path, folder_hint, read_regular_file
from unidiff_sdk._internal.json_values import MAX_DOCUMENT, whole_number
from unidiff_sdk._internal.lifetimes import Owner
from unidiff_sdk._internal.parallel import buffered_map
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import BundleError, OptionError

from .engines.adapters import Adapters
from .folder.diffusers_folder import PIPELINE_FORMAT, AdaptedSession, derive_manifest, is_pipeline
from .folder.files import BundleFiles
from .folder.hub import download_bundle, is_hub_name, upload_bundle
from .folder.interfaces import check_interfaces, read_graph
from .folder.onnx_file import OnnxFile
from .folder.signature import KeyFile, check_signature
from .manifest import (
    GRAPH_FILE,
    MANIFEST,
    Embedding,
    Graph,
    ImageInput,
    Latent,
    Manifest,
    Patches,
    Profile,
    Resize,
    SamplerDefaults,
)
from .schedule import FlowSchedule, Schedule
from .sessions import GraphWarmup, Session, SessionFactory, create_session, engine_of, warm_up
from .shape_profiles import shape_profile

if TYPE_CHECKING:
    from unidiff_sdk._internal.images import Fit

__all__ = ["TINY", "Bundle"]

TINY = Path(__file__).parents[1] / "models" / "tiny"
"""The built-in bundle."""

ONLY_IN_BUNDLES = (f"image_encoder/{GRAPH_FILE}", f"clip_text_encoder/{GRAPH_FILE}", "clip_tokenizer")
"""What a pipeline of optimum does not have. A folder that has it was a bundle before it lost its manifest."""

LOADING_THREADS = 2  # the UNet takes as long to load as all the other graphs of a model
# Loading a graph takes up to twice its size in memory. Larger graphs are loaded one by one, so this does not add up.
LOADED_TOGETHER = 512 << 20


class Bundle:
    """An open bundle. Each graph loads when it is first used. May be shared between threads.

    `Bundle.open` opens a folder. The constructor accepts a parsed manifest and can replace how sessions are created.

    Args:
        session_factory: loads a graph; `create_session` by default.
        files: the files of the folder. Default: those that the manifest lists, unchecked.

    Attributes:
        path: the folder.
        manifest: the content of its `manifest.json`.
        files: the files that may be used.
        device: where the graphs run, such as "cpu", "cuda", "tensorrt" or "openvino"; or "auto", which is "cpu" here if
            OpenVINO cannot run the bundle. The `providers` of a session state what was chosen.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        device: str = "cpu",
        threads: int | None = None,
        capture: bool = False,
        precision: str | None = None,
        session_factory: SessionFactory = create_session,
        files: BundleFiles | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.files = files or BundleFiles(path, manifest.files)
        self.device, self._compute = _placement(path, manifest, device, precision)
        self.adapters = Adapters(self.files, manifest.loras)
        self._threads = None if threads is None else whole_number("threads", threads, at_least=1)
        self._capture = capture
        self._derived = manifest.format == PIPELINE_FORMAT
        self._sessions: dict[str, Session] = {}
        self._onnx_files: dict[str, tuple[OnnxFile, list[str]]] = {}
        self._create_session = session_factory
        self._owner = Owner(f"The bundle {path}")
        self._loading = {name: threading.Lock() for name in manifest.graphs}

    @classmethod
    def open(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        verify: bool = True,
        fingerprint: str | None = None,
        trusted_keys: Sequence[KeyFile] | None = None,
        device: str = "cpu",
        threads: int | None = None,
        capture: bool = False,
        precision: str | None = None,
    ) -> Bundle:
        """Open a bundle folder, or a Stable Diffusion pipeline that optimum exported, which can only generate.

        A folder of optimum has no hashes to compare. It is opened with a warning, unless `verify` is False.

        Args:
            path: the folder. None or "tiny": the built-in bundle. "hf:org/name", optionally with "@revision": a bundle
                on the Hugging Face hub, which is downloaded once (`folder.hub`).
            verify: compare the SHA-256 of every file with the manifest (about a second for each 1.5 GB).
            fingerprint: the fingerprint that the bundle must have. It is compared before any file but the manifest is
                read.
            trusted_keys: PEM files with Ed25519 public keys, one of which must have signed the bundle. Needs the extra
                `sign`. None: signatures are not checked.
            device: "cpu", "cuda" or "tensorrt"; or "openvino" (its CPU plugin), "openvino:GPU" or "openvino:NPU", which
                need the extra `openvino`. "auto": for each graph "cpu" or "openvino", whichever is faster on this
                processor. That is measured when a graph is first used, which loads both, and kept in the user's cache
                folder. Without the extra, it is "cpu".
            threads: number of threads for one call on the CPU. None: one for each core.
            capture: with "cuda", replay calls at the usual shapes (see `profile`) from a CUDA graph, for graphs
                whose nodes all run on the GPU. `warmup` reports which.
            precision: with "openvino" and "auto", the precision of the computation: "f32" (the default), or "bf16" or
                "f16" where the device has it; embeddings then differ slightly from those of the export. With "auto",
                `session` refuses graphs that differ too much. "int8" requires a bundle of that precision, whose
                quantized layers are computed in int8 in any case.

        Raises:
            BundleError: the folder is not a bundle, is incomplete, was changed after its export, has another
                fingerprint, is not signed by a trusted key, or was exported for another device.
            OptionError: the device is unknown, a key cannot be read, or `verify` is False with `trusted_keys`.
        """
        folder = _folder_of(path)
        if trusted_keys is not None and not verify:
            raise OptionError("verify=False cannot be combined with trusted_keys, which sign the hashes of the files")
        if (folder / MANIFEST).is_file():
            manifest = _read_manifest(folder, fingerprint, trusted_keys)
            files = BundleFiles(folder, manifest.files, verify=verify)
        elif fingerprint is trusted_keys is None and is_pipeline(folder):
            manifest = _derive_manifest(folder, verify)
            files = BundleFiles(folder, manifest.files)
        else:
            raise _not_a_bundle(folder)
        files.check()
        bundle = cls(
            folder, manifest, device=device, threads=threads, capture=capture, precision=precision, files=files
        )
        if verify or bundle._derived:
            bundle.check_graphs()
        return bundle

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the bundle to the Hugging Face hub: the files that its manifest lists, its model card and signature.

        Args:
            repository: "org/name" of a repository of models, which is created if it does not exist. Other files in it
                stay.
            private: whether a new repository is private. Models can repeat what they were trained on.
            token: of the hub. Default: the one that `hf auth login` stored, or HF_TOKEN.

        Returns:
            "hf:org/name@commit", which `open` and `Catalog(bundle=)` accept.

        Raises:
            BundleError: the bundle was changed, has no manifest, or the hub refuses it.
        """
        if self._derived:
            raise BundleError(f"{self.path} has no {MANIFEST}, so it is not uploaded. Export a bundle: unidiff-export")
        self.files.check()
        return upload_bundle(self.path, self.manifest.files, repository, private=private, token=token)

    def check_graphs(self) -> None:
        """Check that the graphs have the inputs and outputs that the manifest states. None is loaded.

        `open` does this, unless `verify` is False and the folder has a manifest.

        Raises:
            BundleError: names, shapes or data types differ, or a file is not an ONNX graph.
        """
        found = {name: self._onnx_file(name)[0] for name in self.manifest.graphs}
        check_interfaces(found, self.manifest, self.files, derived=self._derived)

    @property
    def verified(self) -> bool:
        """Whether every file has the SHA-256 that the manifest of the export states.

        False for a folder of optimum, and with `verify=False`.
        """
        return self.files.verify

    def session(self, graph: str) -> Session:
        """A graph that is ready to run, such as "unet"; loaded on first use.

        Raises:
            BundleError: the bundle has no such graph, or it cannot be loaded; or with the device "auto", its results in
                half precision differ too much from those in float32.
            ProviderError: ONNX Runtime or the device is not usable.
            StoreError: this process is a forked child of the one that opened the bundle.
        """
        self._owner.check()
        if (loaded := self._sessions.get(graph)) is not None:
            return loaded
        described = self._graph(graph)
        with self._loading[graph]:
            if graph not in self._sessions:
                self._sessions[graph] = self._load(graph, described)
            return self._sessions[graph]

    def load(self, *graphs: str) -> None:
        """Load graphs that will be used, if they are not loaded yet.

        Small ones are loaded at the same time on a CPU. TensorRT times kernels while it builds an engine, and OpenVINO
        compiles with all threads, so their graphs are loaded one after the other.

        Raises:
            BundleError, ProviderError, StoreError: as `session`, for the first graph that cannot be loaded.
        """
        missing = [graph for graph in dict.fromkeys(graphs) if graph not in self._sessions]
        if self.device == "cpu" and len(missing) > 1 and sum(map(self._size, missing)) <= LOADED_TOGETHER:
            self._owner.check()
            for _ in buffered_map(self.session, missing, workers=LOADING_THREADS):
                pass
        else:
            for graph in missing:
                self.session(graph)

    def _size(self, graph: str) -> int:
        """Bytes of the file of a graph and of its external weights."""
        files = (self._graph(graph).file, *self._onnx_file(graph)[1])
        return sum(self.files.path(file).stat().st_size for file in files)

    def _load(self, graph: str, described: Graph) -> Session:
        for weights in self._onnx_file(graph)[1]:
            self.files.path(weights)
        session = self._create_session(
            self.files.path(described.file),
            device=self.device,
            threads=self._threads,
            profile=self.profile(graph),
            half=described.precision == "fp16",
            fingerprint=self.fingerprint,
            capture=self._capture,
            precision=self._compute,
        )
        return AdaptedSession(session, described) if self._derived else session

    def warmup(self, progress: Callable[[str], None] | None = None) -> list[GraphWarmup]:
        """Load every graph and call it twice at its usual shapes, so that no search and no generation waits for it.

        With TensorRT this builds the engines, which takes minutes the first time. They are kept in the user's cache
        folder, for this bundle and these versions. `progress` is called with one line before each graph.

        Raises:
            BundleError: a graph cannot be loaded, or the manifest does not state its shapes.
            ProviderError: ONNX Runtime or the device is not usable.
        """
        cost = ": TensorRT builds or reads its engine, which takes minutes the first time"
        report = []
        for name, graph in self.manifest.graphs.items():
            profile = self.profile(name)
            if profile is None:
                raise BundleError(f"{self.path}: the manifest does not state the shapes of {name}; export it again")
            zeros = {key: np.zeros(bounds["opt"], graph.inputs[key].dtype) for key, bounds in profile.items()}
            if progress is not None:
                progress(f"loading {name}{cost if self.device == 'tensorrt' else ''}")
            report.append(warm_up(name, partial(self.session, name), zeros))
        return report

    def profile(self, graph: str) -> Profile | None:
        """The smallest, usual and largest shape ("min", "opt", "max") of each input of a graph, if they are known."""
        described = self._graph(graph)
        if described.profile is None and described.inputs:
            return shape_profile(graph, described.inputs, self.manifest)
        return described.profile

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the LoRAs that `generate(lora=)` can switch on."""
        return tuple(self.manifest.loras)

    def has_graph(self, graph: str) -> bool:
        """Whether the bundle holds a graph of that name."""
        return graph in self.manifest.graphs

    def config(self, file: str) -> dict[str, Any]:
        """A JSON file of the bundle, such as "unet/config.json".

        Raises:
            BundleError: it is missing, is not listed in the manifest, was changed, or is not JSON.
        """
        return self.files.read_json(file)

    def schedule(self) -> Schedule | FlowSchedule:
        """The noise schedule that the denoiser was trained with, as diffusers' pipeline of the model reads it."""
        config = self.config("scheduler/scheduler_config.json")
        if self.manifest.joint_conditioning is not None:
            return FlowSchedule.from_config(config)
        return Schedule.from_pipeline(config) if self.manifest.conditioning is None else Schedule.from_config(config)

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change whenever a graph, a tokenizer or a configuration file does."""
        return self.manifest.fingerprint

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def precision(self) -> str:
        """What the weights are stored and computed in: "fp32", "fp16" or "int8"."""
        return self.manifest.precision

    @property
    def synthetic(self) -> bool:
        """Whether the model was trained on rendered images only, without photographs."""
        return self.manifest.synthetic

    @property
    def generates(self) -> bool:
        """Whether the bundle holds a generator. Without one, it only searches."""
        return self.manifest.latent is not None

    @property
    def latent(self) -> Latent:
        """Sizes and scales of the latents. Raises BundleError if the bundle has no generator."""
        if self.manifest.latent is None:
            raise self._without_generator()
        return self.manifest.latent

    @property
    def sampler(self) -> SamplerDefaults:
        """The defaults of generation. Raises BundleError if the bundle has no generator."""
        if self.manifest.sampler is None:
            raise self._without_generator()
        return self.manifest.sampler

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self._embedding.dim

    @property
    def logit_scale(self) -> float:
        """Factor from cosines to logits in contrastive training: the inverse temperature."""
        if self._embedding.logit_scale is None:
            raise BundleError(f"{self.path}: the manifest has no embedding.logit_scale; export the bundle again")
        return self._embedding.logit_scale

    @property
    def max_tokens(self) -> int:
        """Length, in tokens, that texts are padded or truncated to for search."""
        return self._embedding.max_tokens

    @property
    def prompt_tokens(self) -> int:
        """Length, in tokens, that prompts are padded or truncated to. Differs from `max_tokens` only where search and
        generation have different text encoders."""
        return self.manifest.prompt_tokens

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square that the image encoder takes."""
        return self._image.size

    @property
    def image_fit(self) -> Fit:
        """How the training images were made square; "crop" where the manifest does not state it."""
        return "crop" if self.manifest.image is None else self.manifest.image.fit

    @property
    def image_resize(self) -> Resize | None:
        """How an image is resized before the crop. None: the shorter edge to `image_size` by bicubic interpolation."""
        return self._image.resize

    @property
    def image_patches(self) -> Patches | None:
        """How an image is divided into patches, for a NaFlex image encoder. None: the encoder takes squares."""
        return self._image.patches

    @property
    def image_mean(self) -> NDArray[np.float32]:
        """Subtracted from each channel, which lies in [0, 1]: float32[3]."""
        return np.asarray(self._image.mean, np.float32)

    @property
    def image_std(self) -> NDArray[np.float32]:
        """Each channel is then divided by it: float32[3]."""
        return np.asarray(self._image.std, np.float32)

    def __repr__(self) -> str:
        searches = f"{self.dim}-dimensional" if self.manifest.embedding else "generation only"
        searches += "" if self.generates else ", search only"
        return (
            f"Bundle({self.name!r}, {self.precision}, {searches}, device={self.device!r}, "
            f"fingerprint={self.fingerprint[:12]}…, path={str(self.path)!r})"
        )

    @property
    def _embedding(self) -> Embedding:
        if self.manifest.embedding is None:
            raise self._without_clip()
        return self.manifest.embedding

    @property
    def _image(self) -> ImageInput:
        if self.manifest.image is None:
            raise self._without_clip()
        return self.manifest.image

    def _without_clip(self) -> BundleError:
        return BundleError(
            f"{self.path} holds a Stable Diffusion without CLIP: it generates, but cannot search, rank or index. "
            "Export both together: unidiff-export CKPT -o BUNDLE"
        )

    def _without_generator(self) -> BundleError:
        return BundleError(
            f"{self.path} has no generator: it searches, but cannot generate, re-rank (rerank=) or imagine (imagine=). "
            "Export the encoders together with a Stable Diffusion: unidiff-export CKPT --clip CLIP -o BUNDLE"
        )

    def _onnx_file(self, graph: str) -> tuple[OnnxFile, list[str]]:
        """What the file of a graph states, and the paths of its external weights in the bundle."""
        if graph not in self._onnx_files:
            self._onnx_files[graph] = read_graph(self.files, self._graph(graph))
        return self._onnx_files[graph]

    def _graph(self, name: str) -> Graph:
        graphs = self.manifest.graphs
        if name not in graphs:
            raise BundleError(f"{self.path}: there is no graph {name!r}; the bundle holds {', '.join(sorted(graphs))}")
        return graphs[name]


def _folder_of(path: str | PathLike[str] | None) -> Path:
    """The folder of a bundle; one on the hub is downloaded. A Path never names one: it may be a stranger's."""
    if path is None or path == "tiny":
        return TINY
    return download_bundle(path) if isinstance(path, str) and is_hub_name(path) else checked_path(path, BundleError)


def _placement(path: Path, manifest: Manifest, device: str, precision: str | None) -> tuple[str, str | None]:
    """The `device` and the `precision` of `create_session`. "auto" is "cpu" for what only ONNX Runtime runs."""
    compute = _compute_precision(path, manifest, precision)
    if device != "auto" or compute not in (None, "f32"):
        _check_device(path, manifest, "openvino" if device == "auto" else device)
        return device, compute
    _check_device(path, manifest, "cpu")
    return ("auto" if _runs_in_openvino(manifest) and not manifest.loras else "cpu"), None


def _runs_in_openvino(manifest: Manifest) -> bool:
    """Whether OpenVINO has the operators: it has those of ONNX, but not those of graphs for GPUs."""
    return manifest.devices is None or manifest.devices[0] == "cpu"


def _check_device(path: Path, manifest: Manifest, device: str) -> None:
    engine = engine_of(device)
    if manifest.devices is None or (engine == "openvino" and _runs_in_openvino(manifest)):
        return
    if engine == "openvino":
        raise BundleError(
            f"{path} was exported for {manifest.target}; OpenVINO runs bundles for CPUs: unidiff-export CKPT -o BUNDLE "
            "--target cpu"
        )
    if device not in manifest.devices:
        raise BundleError(
            f"{path} was exported for {manifest.target}, which runs on {' and '.join(manifest.devices)}; for device "
            f"{device!r} export another: unidiff-export CKPT -o BUNDLE --target {device}"
        )


def _compute_precision(path: Path, manifest: Manifest, precision: str | None) -> str | None:
    """The `precision` of `create_session`. int8 is a property of the graphs."""
    if precision != "int8":
        return precision
    if manifest.precision != "int8":
        raise OptionError(
            f"precision is 'int8', but {path} is an {manifest.precision} bundle; export another with --int8"
        )
    return None


def _read_manifest(folder: Path, fingerprint: str | None, trusted_keys: Sequence[KeyFile] | None) -> Manifest:
    file = folder / MANIFEST
    content = read_regular_file(file, MAX_DOCUMENT, BundleError)
    if trusted_keys is not None:
        check_signature(folder, content, trusted_keys)
    manifest = Manifest.parse(content, file)
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise BundleError(
            f"{folder}: has the fingerprint {manifest.fingerprint:.12}, not {fingerprint:.12}; give the bundle with "
            "that fingerprint"
        )
    return manifest


def _derive_manifest(folder: Path, verify: bool) -> Manifest:
    """The manifest of a folder that has none."""
    own = next((name for name in ONLY_IN_BUNDLES if (folder / name).exists()), None)
    if own is not None:
        raise BundleError(
            f"{folder}: has no {MANIFEST}, but {own}, which only bundles have: it is damaged; copy the whole bundle, "
            "or export it again"
        )
    if verify:
        warn(
            f"{folder} has no {MANIFEST}, so nothing shows whether its files are complete and unchanged. Pass "
            "verify=False to open it without this warning."
        )
    return derive_manifest(folder)


def _not_a_bundle(folder: Path) -> BundleError:
    """Why a folder without a manifest cannot be opened, and what to do."""
    if folder == TINY:
        return BundleError(
            f"the default bundle is missing from this installation ({folder}); reinstall unidiff-sdk, or give a bundle"
        )
    if not folder.is_dir():
        return BundleError(f"{folder}: there is no such folder; give the folder that unidiff-export wrote, or 'tiny'")
    if hint := folder_hint(folder):
        return BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.{hint}")
    return BundleError(f"{folder} is not a bundle: it has no {MANIFEST}. Give the folder that unidiff-export wrote.")
