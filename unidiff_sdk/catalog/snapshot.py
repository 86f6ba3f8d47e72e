"""What a catalog answers with at a moment: a store, and the bundle that made its vectors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Store

from .catalog_file import CHANGING, BundleRef, CatalogFile

if TYPE_CHECKING:
    from unidiff_sdk.generation.generator import Generator

__all__ = ["Serving"]


class Serving:
    """The vectors of a catalog and the model that made them: what a reindexing replaces as one.

    Whatever needs both takes them from one of these, so that a query of the old bundle never meets the new vectors.

    Args:
        store: the vectors.
        folder: of the catalog, from which the bundle is found.
        reference: the bundle that the vectors are of.
        bundle: the same, where it is open already; else it is opened when it is first needed.
    """

    def __init__(self, store: Store, folder: Path, reference: BundleRef, bundle: Bundle | None = None) -> None:
        self.store, self.reference = store, reference
        self._folder, self._bundle = folder, bundle
        self._encoder: Encoder | None = None
        self._generator: Generator | None = None
        self._lock = threading.RLock()

    @property
    def bundle(self) -> Bundle:
        """The model. Raises BundleError if it is missing, StoreError if it is not the one that it was."""
        with self._lock:
            if self._bundle is None:
                self._bundle = self._opened()
            return self._bundle

    def _opened(self) -> Bundle:
        path = self.reference.locate(self._folder)
        if not path.is_dir():
            raise BundleError(
                f'The bundle "{self.reference.name}" that {self._folder} was indexed with is not at {path}. '
                "Put it back, or say where it is now: Catalog(location, bundle=…)."
            )
        bundle = Bundle.open(path)
        self.reference.check(bundle, self._folder)
        with CHANGING:
            file = CatalogFile.read(self._folder)
            if file is not None and file.bundle.fingerprint == bundle.fingerprint:  # reindexed since, it has another
                file.adopt(bundle, self._folder)
        return bundle

    @property
    def encoder(self) -> Encoder:
        """Of the bundle."""
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(self.bundle)
            return self._encoder

    @property
    def generator(self) -> Generator:
        """Of the bundle."""
        from unidiff_sdk.generation.generator import Generator  # with its samplers, not needed for most searches

        with self._lock:
            if self._generator is None:
                self._generator = Generator(self.bundle)
            return self._generator
