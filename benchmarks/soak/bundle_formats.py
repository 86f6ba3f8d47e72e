"""The other formats that are mutated: bundles, ONNX graphs, catalog folders, archives and checkpoints."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import MANIFEST, file_sha256, fingerprint_of, manifest_checksum

from .corpus import copy_sparse, pixels
from .formats import FORMATS, Format
from .mutators import mutate_bytes, mutate_json, mutate_value, odd_value, to_text

__all__ = ["ALL_FORMATS", "CheckpointConfigs"]

STEPS = 2


def use_bundle(folder: Path) -> None:
    """Open a bundle and call everything that it holds."""
    bundle = Bundle.open(folder, threads=1)
    repr(bundle)
    if bundle.has_graph("text_encoder") and bundle.has_graph("image_encoder"):
        encoder = Encoder(bundle)
        encoder.encode_texts(["a red item", ""])
        encoder.encode_images([pixels(1)])
    if bundle.has_graph("unet"):
        Generator(bundle).generate("a red item", n=1, seed=1, steps=STEPS)


class BundleFile(Format):
    """One file of a bundle, in a folder that is otherwise valid.

    An input starts with a line that names the file.
    """

    template = "toy"
    files: tuple[str, ...] = ()

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self._bundle = shutil.copytree(corpus / self.template, folder / "bundle")
        self._valid = {file: (self._bundle / file).read_bytes() for file in (*self.files, MANIFEST)}

    def make(self, rng: Random) -> bytes:
        file = rng.choice(self.files)
        return file.encode() + b"\n" + self.mutate(rng, file, self._valid[file])

    def mutate(self, rng: Random, file: str, data: bytes) -> bytes:
        """The mutated content of one file."""
        return mutate_json(rng, data)

    def use(self, content: bytes) -> None:
        name, _, data = content.partition(b"\n")
        file = self._bundle / name.decode()
        try:
            file.unlink()  # a mapped graph must not change below an open session
            file.write_bytes(data)
            self.seal(name.decode())
            use_bundle(self._bundle)
        finally:
            for valid in {name.decode(), MANIFEST}:
                (self._bundle / valid).unlink(missing_ok=True)
                (self._bundle / valid).write_bytes(self._valid[valid])

    def seal(self, changed: str) -> None:
        """Make the hashes in the manifest right again."""
        manifest = json.loads(self._valid[MANIFEST])
        manifest["files"][changed] = file_sha256(self._bundle / changed)
        manifest["fingerprint"] = fingerprint_of(manifest["files"])
        manifest["checksum"] = manifest_checksum(manifest)
        (self._bundle / MANIFEST).write_text(json.dumps(manifest))


class Manifests(BundleFile):
    """manifest.json, mostly with a right checksum."""

    name, files = "manifest", (MANIFEST,)

    def mutate(self, rng: Random, file: str, data: bytes) -> bytes:
        if rng.random() < 0.2:
            return mutate_json(rng, data)
        mutated = mutate_value(rng, json.loads(data))
        if isinstance(mutated, dict) and rng.random() < 0.9:
            try:
                mutated["checksum"] = manifest_checksum(mutated)
            except (TypeError, ValueError):  # what cannot be written as JSON has no checksum
                return to_text(mutated)
        return to_text(mutated)

    def seal(self, changed: str) -> None:
        """Leave the manifest as it is."""


class Configs(BundleFile):
    """The other JSON files of a bundle: scheduler, tokenizer and model configurations."""

    name = "config"
    files = (
        "scheduler/scheduler_config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        "unet/config.json",
        "vae_decoder/config.json",
    )

    def mutate(self, rng: Random, file: str, data: bytes) -> bytes:
        if "scheduler" in file and rng.random() < 0.4:
            config = json.loads(data) | _scheduler_options(rng)
            return to_text(mutate_value(rng, config) if rng.random() < 0.3 else config)
        return mutate_json(rng, data)


def _scheduler_options(rng: Random) -> dict[str, Any]:
    """Settings of diffusers' schedulers, in combinations that the base may or may not support."""
    choices: dict[str, tuple[Any, ...]] = {
        "_class_name": (
            "DDIMScheduler",
            "PNDMScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSDEScheduler",
            "LCMScheduler",
            "DEISMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "EDMEulerScheduler",
            "NoSuchScheduler",
        ),
        "timestep_spacing": ("leading", "linspace", "trailing", "none"),
        "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        "beta_start": (0, 1e-9, 0.5, 1, -1),
        "beta_end": (0, 1, 0.9999, 1e-9, 2),
        "steps_offset": (0, 1, 999, -1),
        "num_train_timesteps": (1, 2, 4, 1000, 10**7),
        "trained_betas": (None, [], [0.1] * 1000, [0.1, 2]),
        "rescale_betas_zero_snr": (True, False),
        "thresholding": (True, False),
        "clip_sample": (True, False),
        "use_karras_sigmas": (True, False),
        "use_exponential_sigmas": (True, False),
        "set_alpha_to_one": (True, False),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "solver_order": (1, 2, 3),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    return {name: rng.choice(choices[name]) for name in rng.sample(list(choices), rng.choice((1, 2, 3)))}


class Onnx(BundleFile):
    """Graphs whose hashes match the manifest."""

    name, suffix = "onnx", ".onnx"
    files = tuple(
        f"{graph}/model.onnx" for graph in ("text_encoder", "image_encoder", "unet", "vae_decoder", "vae_encoder")
    )

    def mutate(self, rng: Random, file: str, data: bytes) -> bytes:
        if rng.random() < 0.35:
            return mutate_bytes(rng, data, list(self._valid.values()))
        import onnx

        model = onnx.load_from_string(data)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(_GRAPH_MUTATIONS)(rng, model)
        return bytes(model.SerializeToString())


def _change_value_info(rng: Random, model: Any) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    tensor = value.type.tensor_type
    match rng.randrange(4):
        case 0:
            tensor.elem_type = rng.choice((0, 1, 2, 7, 8, 10, 11, 16, 99))
        case 1:
            dimension = rng.choice(tensor.shape.dim) if tensor.shape.dim else tensor.shape.dim.add()
            dimension.dim_value = rng.choice((0, 1, 2, 3, 16, 77, 2**31, -1))
        case 2:
            if tensor.shape.dim and rng.random() < 0.5:
                del tensor.shape.dim[0]
            else:
                tensor.shape.dim.add().dim_param = "extra"
        case _:
            value.name = rng.choice(("", "other", "x" * 3000, value.name + "2"))


def _change_node(rng: Random, model: Any) -> None:
    if not model.graph.node:  # an earlier change removed the only one
        return
    node = rng.choice(model.graph.node)
    operators = (
        "Relu",
        "MatMul",
        "Reshape",
        "Expand",
        "Loop",
        "Tile",
        "Div",
        "Sqrt",
        "NoSuchOp",
        "ConstantOfShape",
        "Range",
    )
    match rng.randrange(5):
        case 0:
            node.op_type = rng.choice(operators)
        case 1:
            node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "nowhere"))
        case 2:
            if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(("", "missing", *model.graph.node[0].output))
        case 3:
            attribute = node.attribute.add() if not node.attribute or rng.random() < 0.5 else rng.choice(node.attribute)
            attribute.name = attribute.name or rng.choice(("axis", "axes", "perm", "to", "shape"))
            attribute.type, attribute.i = 2, rng.choice((-1, 0, 1, 7, 2**62))
        case _:
            model.graph.node.remove(node)


def _change_weights(rng: Random, model: Any) -> None:
    tensor = rng.choice(model.graph.initializer) if model.graph.initializer else model.graph.initializer.add()
    match rng.randrange(6):
        case 0:
            tensor.dims[:] = rng.choice(([], [0], [2**40], [-1], [1, 1, 1], [3, 8], [2**31, 2**31]))
        case 1:
            tensor.data_type = rng.choice((0, 1, 2, 6, 7, 10, 11, 99))
        case 2:
            tensor.raw_data = rng.choice((b"", b"\xff" * len(tensor.raw_data), rng.randbytes(64), b"\0\0\xc0\x7f" * 64))
        case 3:
            tensor.data_location = 1
            place = tensor.external_data.add()
            place.key = "location"
            place.value = rng.choice(("../../../../etc/passwd", "/dev/zero", "model.onnx", "missing.bin", "", "\0"))
        case 4:
            tensor.name = rng.choice(("", "other"))
        case _:
            model.graph.initializer.remove(tensor)


def _change_model(rng: Random, model: Any) -> None:
    match rng.randrange(4):
        case 0:
            model.ir_version = rng.choice((0, 1, 3, 9, 99, 2**40))
        case 1:
            model.opset_import[0].version = rng.choice((0, 1, 6, 13, 22, 99))
        case 2:
            entry = model.metadata_props.add()
            entry.key, entry.value = "note", "\x1b[31m" * 100
        case _:
            model.graph.name = rng.choice(("", "x" * 5000))


_GRAPH_MUTATIONS = (_change_value_info, _change_node, _change_node, _change_weights, _change_weights, _change_model)


# ------------------------------------------------------------------------------------------------ catalogs


class CatalogFiles(Format):
    """catalog.json and the small files of the store, in a catalog that is otherwise valid.

    Whatever is in them, opening and using the catalog must not delete an image or a vector.
    """

    name = "catalog"

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self._bundle = shutil.copytree(corpus / "colors", folder / "colors")
        self._catalog = folder / "shop.catalog"
        self._copy()

    def _copy(self) -> None:
        shutil.rmtree(self._catalog, ignore_errors=True)
        copy_sparse(self.corpus / "shop.catalog", self._catalog)
        files = [file for file in sorted(self._catalog.rglob("*")) if file.is_file()]
        self._small = {
            file.relative_to(self._catalog).as_posix(): file.read_bytes()
            for file in files
            if file.name == "current" or file.suffix == ".json"
        }
        self._kept = {file for file in files if file.suffix in (".png", ".webp")}

    def make(self, rng: Random) -> bytes:
        file = rng.choice(("catalog.json", "catalog.json", *self._small))
        data = self._small[file]
        is_json = file.endswith(".json")
        return file.encode() + b"\n" + (mutate_json(rng, data) if is_json else self._pointer(rng, data))

    @staticmethod
    def _pointer(rng: Random, data: bytes) -> bytes:
        odd = ("", ".", "..", "../..", "/", "/etc", "missing", "a\0b", "\n", "shard", "../images", "x" * 5000)
        return rng.choice((rng.choice(odd).encode(), mutate_bytes(rng, data)))

    def use(self, content: bytes) -> None:
        name, _, data = content.partition(b"\n")
        file = self._catalog / name.decode()
        file.write_bytes(data)
        try:
            with Catalog(self._catalog, create=False) as catalog:
                catalog.info()
                catalog.search("red", limit=3)
                catalog.count({"price": {"lt": 12}})
        finally:
            missing = [kept for kept in self._kept if not kept.exists()]
            if missing or not file.exists():
                self._copy()
            file.write_bytes(self._small[name.decode()])
        if missing:
            raise AssertionError(f"{len(missing)} images were deleted, such as {missing[0]}")
        self._check_intact()

    def _check_intact(self) -> None:
        """A valid file again: the items must all be there."""
        try:
            with Catalog(self._catalog, self._bundle, create=False) as catalog:
                if catalog.count() != len(self._kept) // 2:
                    raise AssertionError(f"{catalog.count()} items are left")
        except BaseException:
            self._copy()
            raise


class Archives(Format):
    """Files of Catalog.export: restored, and searched."""

    name, suffix = "archive", ".parquet"

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        import pyarrow.parquet as pq

        self._data = (corpus / "shop.parquet").read_bytes()
        self._table = pq.read_table(io.BytesIO(self._data))
        self._bundle = Bundle.open(corpus / "colors", threads=1)

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, self._data)
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = self._table.to_pylist()
        schema = self._table.schema
        match rng.randrange(5):
            case 0:
                metadata = mutate_json(rng, schema.metadata[b"unidiff"])
                schema = schema.with_metadata({b"unidiff": metadata})
            case 1:
                row = rng.choice(rows)
                row["payload"] = mutate_json(rng, row["payload"].encode()).decode("utf-8", "replace")
            case 2:
                row = rng.choice(rows)
                row["vector"] = rng.choice(([float("nan")] * 4, [0.0] * 4, [float("inf")] * 4, [1e38] * 4, [1e-45] * 4))
            case 3:
                row, name = rng.choice(rows), rng.choice(("id", "sha256", "source", "text", "image"))
                odd = str(odd_value(rng)).encode("utf-8", "replace")
                row[name] = odd if name == "image" else odd.decode()
            case _:
                rows.append(dict(rng.choice(rows)))
                rng.choice(rows)["id_is_int"] = rng.random() < 0.5
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
        return buffer.getvalue()

    def use(self, content: bytes) -> None:
        file, place = self.folder / "shop.parquet", self.folder / "restored"
        file.write_bytes(content)
        try:
            with Catalog.restore(file, place, self._bundle) as catalog:
                catalog.search("red", limit=3)
                for hit in catalog.browse(limit=20):
                    hit.load_image()
        finally:
            shutil.rmtree(place, ignore_errors=True)


class CheckpointConfigs(Format):
    """The JSON files of a training checkpoint. Needs the folder `checkpoint` in the corpus."""

    name, suffix = "checkpoint", ".json"
    files = (
        "unidiff.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "clip/preprocessor_config.json",
        "clip/config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
    )

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self._checkpoint = shutil.copytree(corpus / "checkpoint", folder / "checkpoint")
        self._valid = {file: (self._checkpoint / file).read_bytes() for file in self.files}
        self._changed = ""
        self._keep_loaded_parts()

    def _keep_loaded_parts(self) -> None:
        """Load the parts that no input changed only once: the weights take most of the time."""
        from unidiff_sdk.training.checkpoints import checkpoint
        from unidiff_sdk.training.checkpoints.loading import models

        load, loaded = models.from_pretrained, {}

        def remembered(loader: Any, folder: Path, **options: Any) -> Any:
            part = folder.relative_to(self._checkpoint).as_posix()
            if self._changed.startswith(f"{part}/"):
                return load(loader, folder, **options)
            if (loader, part) not in loaded:
                loaded[loader, part] = load(loader, folder, **options)
            return copy.deepcopy(loaded[loader, part])

        for module in (checkpoint, models):
            module.from_pretrained = remembered

    def make(self, rng: Random) -> bytes:
        file = rng.choice(self.files)
        data = self._valid[file]
        if "scheduler" in file and rng.random() < 0.4:
            return file.encode() + b"\n" + to_text(json.loads(data) | _scheduler_options(rng))
        return file.encode() + b"\n" + mutate_json(rng, data)

    def use(self, content: bytes) -> None:
        from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint, require_supported

        name, _, data = content.partition(b"\n")
        self._changed = name.decode()
        file = self._checkpoint / self._changed
        file.write_bytes(data)
        try:
            checkpoint = require_supported(load_checkpoint(self._checkpoint))
            checkpoint.sampler_defaults, checkpoint.normalization, checkpoint.image_size, checkpoint.describe_sharing()
        finally:
            file.write_bytes(self._valid[name.decode()])


ALL_FORMATS: Mapping[str, Callable[[Path, Path], Format]] = {
    **FORMATS,
    **{kind.name: partial(kind) for kind in (Manifests, Configs, Onnx, CatalogFiles, Archives, CheckpointConfigs)},
}


def names(only: Sequence[str] = ()) -> list[str]:
    """The names of the formats that `--only` selects."""
    return [name for name in ALL_FORMATS if not only or name in only]
