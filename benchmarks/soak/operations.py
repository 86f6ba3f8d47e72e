"""The operations that are killed, or that meet a full disk: how each starts, what it acknowledges, what must hold."""

from __future__ import annotations

import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from unidiff_sdk import Catalog

from .corpus import items, jsonl, png

__all__ = ["OPERATIONS", "Operation", "left_overs"]

FOLDERS, IN_FOLDER = 4, 6
N = FOLDERS * IN_FOLDER

Acknowledge = Callable[[str], None]


class Operation(ABC):
    """One operation on a folder.

    Args:
        corpus: the folder that `write_corpus` filled.
    """

    name = ""

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus
        self.bundle = corpus / "colors"

    def warm_up(self) -> None:  # noqa: B027 (most need none)
        """Do in the parent what each forked child would repeat. It opens no catalog and no bundle."""

    @abstractmethod
    def set_up(self, folder: Path) -> None:
        """Write what is there before the operation."""

    @abstractmethod
    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        """Run it to its end. `acknowledge` is called with a name after each part that is promised to be stored."""

    @abstractmethod
    def check(self, folder: Path, acknowledged: list[str]) -> None:
        """Check what an interrupted run left, run it again, and check the result. Raises AssertionError."""


def require(condition: object, message: str) -> None:
    """Raise AssertionError with a message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


# ------------------------------------------------------------------------------------------------ catalogs


class CatalogOperation(Operation):
    """An operation on a catalog of items from several folders."""

    def set_up(self, folder: Path) -> None:
        write_products(folder)
        with self.open(folder) as catalog:
            for name in sub_folders():
                catalog.add_folder(folder / "products" / name)

    def open(self, folder: Path) -> Catalog:
        """Open the catalog, with the bundle that its catalog.json names."""
        place = folder / "shop.catalog"
        return Catalog(place, None if (place / "catalog.json").exists() else self.bundle)

    def expect(self, folder: Path, present: Iterable[Any], absent: Iterable[Any] = (), *, repair: bool = True) -> None:
        """Check that items are in the catalog, whole, and that others are not.

        Args:
            repair: first delete what a killed process left, as `Catalog.check` does. Nothing may be left after it.
        """
        with self.open(folder) as catalog:
            report = catalog.check()
            if repair and (report.orphaned_images or report.leftovers):  # else it would only build the index
                catalog.check(repair=True)
                report = catalog.check()
            stored = {hit.id: hit for hit in catalog.browse(limit=10_000)}
            missing = [id for id in present if id not in stored]
            require(not missing, f"{len(missing)} acknowledged items are lost, such as {missing[:3]}")
            remaining = [id for id in absent if id in stored]
            require(not remaining, f"{len(remaining)} deleted items are back, such as {remaining[:3]}")
            require(catalog.count() == len(stored), f"count() is {catalog.count()}, but {len(stored)} items are listed")
            for hit in stored.values():
                hit.load_image()
            if stored:
                found = {hit.id for hit in catalog.search("red", limit=10_000)}
                require(found == set(stored), f"a search finds {len(found)} of {len(stored)} items")
            damaged = report.missing_images or report.missing_vectors or report.damaged
            require(not damaged, f"the check reports {report}")
            require(not repair or not (report.orphaned_images or report.leftovers), f"after the repair: {report}")
        extra = left_overs(folder / "shop.catalog") if repair else []
        require(not extra, f"left-overs after opening, repairing and closing: {extra[:3]}")


def sub_folders() -> list[str]:
    """The names of the folders of images."""
    return [f"part{k}" for k in range(FOLDERS)]


@lru_cache(maxsize=1)
def _files() -> dict[str, bytes]:
    """The files of all folders by their path."""
    files = {}
    rows = items(N)
    for part, name in enumerate(sub_folders()):
        own = [{**row, "id": row["text"]} for row in rows[part * IN_FOLDER : (part + 1) * IN_FOLDER]]
        files[f"{name}/metadata.jsonl"] = jsonl(own)
        for row in own:
            files[f"{name}/{row['file_name']}"] = png(int(row["file_name"].removesuffix(".png")))
    return files


def write_products(folder: Path) -> None:
    """Write the folders of images."""
    for name, content in _files().items():
        file = folder / "products" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def ids_of(part: int | None = None) -> list[str]:
    """The ids of the items of one folder, or of all."""
    rows = items(N) if part is None else items(N)[part * IN_FOLDER : (part + 1) * IN_FOLDER]
    return [row["text"] for row in rows]


class Index(CatalogOperation):
    """add_folder, one folder after the other."""

    name = "index"

    def set_up(self, folder: Path) -> None:
        write_products(folder)

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        with self.open(folder) as catalog:
            for part, name in enumerate(sub_folders()):
                catalog.add_folder(folder / "products" / name)
                acknowledge(str(part))

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        self.expect(folder, [id for part in acknowledged for id in ids_of(int(part))])
        self.run(folder, lambda part: None)
        self.expect(folder, ids_of())


class Delete(CatalogOperation):
    """delete, a few items at a time, until none is left."""

    name = "delete"

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        with self.open(folder) as catalog:
            for start in range(0, N, 2):
                catalog.delete(ids_of()[start : start + 2])
                acknowledge(str(start))

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        done = 2 * len(acknowledged)
        self.expect(folder, ids_of()[done + 2 :], ids_of()[:done])
        self.run(folder, lambda start: None)
        self.expect(folder, [], ids_of())


class Prune(CatalogOperation):
    """add_folder with prune=True after rows were removed, one folder after the other."""

    name = "prune"

    def set_up(self, folder: Path) -> None:
        super().set_up(folder)
        for name in sub_folders():
            table = folder / "products" / name / "metadata.jsonl"
            table.write_bytes(b"".join(table.read_bytes().splitlines(keepends=True)[::2]))

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        with self.open(folder) as catalog:
            for part, name in enumerate(sub_folders()):
                catalog.add_folder(folder / "products" / name, prune=True)
                acknowledge(str(part))

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        kept = [id for part in range(FOLDERS) for id in ids_of(part)[::2]]
        self.expect(folder, kept, [id for part in acknowledged for id in ids_of(int(part))[1::2]])
        self.run(folder, lambda part: None)
        self.expect(folder, kept, set(ids_of()) - set(kept))


class Reindex(CatalogOperation):
    """reindex with another bundle, and back."""

    name = "reindex"

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        with self.open(folder) as catalog:
            for name in ("colors2", "colors", "colors2"):
                catalog.reindex(self.corpus / name)
                acknowledge(name)

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        self.expect(folder, ids_of(), repair=False)  # the next run continues what the repair would delete
        self.run(folder, lambda name: None)
        self.expect(folder, ids_of())
        stores = [place for place in (folder / "shop.catalog").glob("vectors*")]
        require(len(stores) == 1, f"{len(stores)} stores of vectors are left: {[place.name for place in stores]}")


class Optimize(CatalogOperation):
    """optimize, which builds the index in a child process."""

    name = "optimize"

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        with self.open(folder) as catalog:
            catalog.optimize()
            acknowledge("done")

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        self.expect(folder, ids_of())
        self.run(folder, lambda name: None)
        self.expect(folder, ids_of())


class Export(CatalogOperation):
    """Catalog.export, which replaces an earlier archive."""

    name = "export"

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        with self.open(folder) as catalog:
            for count in (1, 2):
                catalog.export(folder / "archives" / "shop.parquet", overwrite=True)
                acknowledge(str(count))

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        archive = folder / "archives" / "shop.parquet"
        require(archive.exists() or not acknowledged, "an acknowledged archive is gone")
        if archive.exists():
            restored(archive, folder / "check.catalog", self.bundle)
        self.run(folder, lambda count: None)
        restored(archive, folder / "check.catalog", self.bundle)
        names = [entry.name for entry in archive.parent.iterdir()]
        require(names == [archive.name], f"left-overs next to the archive: {names}")
        self.expect(folder, ids_of())


class Restore(CatalogOperation):
    """Catalog.restore into a new folder."""

    name = "restore"

    def set_up(self, folder: Path) -> None:
        source = folder / "source"
        source.mkdir(parents=True)
        super().set_up(source)
        with self.open(source) as catalog:
            catalog.export(folder / "shop.parquet")
        shutil.rmtree(source)

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        Catalog.restore(folder / "shop.parquet", folder / "shop.catalog", self.bundle).close()
        acknowledge("done")

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        place = folder / "shop.catalog"
        require(place.exists() or not acknowledged, "an acknowledged catalog is gone")
        if not place.exists():
            self.run(folder, lambda name: None)
        self.expect(folder, ids_of())
        names = sorted(entry.name for entry in folder.iterdir())
        require(names == ["shop.catalog", "shop.parquet"], f"left-overs next to the catalog: {names}")


def restored(archive: Path, place: Path, bundle: Path) -> None:
    """Check that an archive is whole: restore it."""
    with Catalog.restore(archive, place, bundle) as catalog:
        require(catalog.count() == N, f"the archive has {catalog.count()} of {N} items")
    shutil.rmtree(place)


def left_overs(catalog: Path) -> list[str]:
    """Files of a closed catalog that no item needs: unfinished ones, and images without an item."""
    found = [
        entry.relative_to(catalog).as_posix()
        for entry in catalog.rglob("*")
        if entry.name.endswith((".part", ".tmp")) or ".partial" in entry.name or ".old" in entry.name
    ]
    with Catalog(catalog, create=False) as opened:
        used = {Path(hit.uri).stem for hit in opened.browse(limit=10_000)}
    for kind in ("images", "thumbnails"):
        files = [file for file in (catalog / kind).rglob("*") if file.is_file()]
        found += [file.relative_to(catalog).as_posix() for file in files if file.stem not in used]
    return found


# ------------------------------------------------------------------------------------------------ training, export

TRAINING = {"steps": 4, "batch_size": 3, "save_every": 1, "warmup_steps": 1, "learning_rate": 1e-3}


class Training(Operation):
    """unidiff-train, resumed until it ends. The weights must be those of an uninterrupted run, bit for bit."""

    name = "training"

    def set_up(self, folder: Path) -> None:
        write_products(folder)

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        from unidiff_sdk.training.config import TrainingConfig
        from unidiff_sdk.training.loop.trainer import train

        warnings.simplefilter("ignore")
        base, out = self.corpus / "checkpoint", folder / "run"
        steps: dict[str, Any] = {"on_step": lambda report: acknowledge(str(report.step))}
        train(folder / "products" / "part0", base, out, TrainingConfig(**TRAINING), device="cpu", resume=True, **steps)

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        self.run(folder, lambda step: None)
        require(
            weights(folder / "run") == weights(self.corpus / "trained" / "run"), "the resumed run has other weights"
        )
        names = sorted(entry.name for entry in folder.iterdir())
        require(names == ["products", "run"], f"left-overs next to the checkpoint: {names}")


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The weight files of a checkpoint."""
    return {str(file.relative_to(checkpoint)): file.read_bytes() for file in sorted(checkpoint.rglob("*.safetensors"))}


class BundleExport(Operation):
    """unidiff-export over an existing bundle.

    Tracing the graphs takes most of an export and writes nothing. It is done once before the trials: `warm_up` keeps
    the traced graphs, and the trials write, compare and rename as usual.
    """

    name = "unidiff-export"

    def warm_up(self) -> None:
        """Trace the graphs of the checkpoint in this process; forked children find them."""
        from unidiff_export.bundle import graph_writer
        from unidiff_export.graphs.lowering import graph_specs, lower
        from unidiff_export.options import TARGETS
        from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

        specs = graph_specs(load_checkpoint(self.corpus / "checkpoint"))
        traced = {spec.name: lower(spec, TARGETS["cpu"]) for spec in specs}
        graph_writer.lower = lambda spec, target, **_: traced[spec.name].clone()

    def set_up(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.run(folder, lambda name: None)

    def run(self, folder: Path, acknowledge: Acknowledge) -> None:
        from unidiff_export.exporter import export_bundle

        warnings.simplefilter("ignore")
        export_bundle(self.corpus / "checkpoint", folder / "bundle", overwrite=True)
        acknowledge("done")

    def check(self, folder: Path, acknowledged: list[str]) -> None:
        from .bundle_formats import use_bundle

        bundle = folder / "bundle"
        if bundle.exists():  # not between the two renames of a replacement, which the next run completes
            use_bundle(bundle)
        else:
            require(not acknowledged, "an acknowledged bundle is gone")
            require(any(folder.iterdir()), "the earlier bundle is gone, too")
        self.run(folder, lambda name: None)
        use_bundle(bundle)
        names = sorted(entry.name for entry in folder.iterdir())
        require(names == ["bundle"], f"left-overs next to the bundle: {names}")


OPERATIONS: dict[str, Callable[[Path], Operation]] = {
    kind.name: partial(kind)
    for kind in (Index, Delete, Prune, Reindex, Optimize, Export, Restore, Training, BundleExport)
}
