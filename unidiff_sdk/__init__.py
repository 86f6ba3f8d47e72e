"""UniDiff SDK: one jointly tuned model searches a product catalog and generates new images for it.

from unidiff_sdk import Catalog

with Catalog("shop.catalog") as catalog:
    catalog.add_folder("products/")
    hits = catalog.search("red striped dress", where={"price": {"lt": 80}})
    images = catalog.generate("purple dotted boots", n=4, seed=7)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog.catalog import Catalog as Catalog
    from .catalog.results import AddReport as AddReport
    from .catalog.results import Generated as Generated
    from .catalog.results import Generation as Generation
    from .errors import BundleError as BundleError
    from .errors import BusyError as BusyError
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import ExportError as ExportError
    from .errors import FilterError as FilterError
    from .errors import ForbiddenError as ForbiddenError
    from .errors import GenerationError as GenerationError
    from .errors import ImageError as ImageError
    from .errors import InUseError as InUseError
    from .errors import OptionError as OptionError
    from .errors import ProviderError as ProviderError
    from .errors import StoredImageError as StoredImageError
    from .errors import StoreError as StoreError
    from .errors import TrainingError as TrainingError
    from .errors import UniDiffError as UniDiffError
    from .generation.options import GenerationOptions as GenerationOptions
    from .inference.bundle import Bundle as Bundle
    from .retrieval.options import SearchOptions as SearchOptions
    from .retrieval.results import Hit as Hit
    from .retrieval.results import Page as Page
    from .store.images.checking import CheckReport as CheckReport
    from .store.images.object_storage import ObjectStorage as ObjectStorage
    from .store.server.connection import ServerOptions as ServerOptions

    __version__: str

# Where each public name lives. They are imported when first asked for, so that `import unidiff_sdk` costs nothing.
_HOME = {
    "AddReport": "catalog.results",
    "Bundle": "inference.bundle",
    "BundleError": "errors",
    "BusyError": "errors",
    "Catalog": "catalog.catalog",
    "CheckReport": "store.images.checking",
    "CheckpointError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "FilterError": "errors",
    "ForbiddenError": "errors",
    "Generated": "catalog.results",
    "Generation": "catalog.results",
    "GenerationError": "errors",
    "GenerationOptions": "generation.options",
    "Hit": "retrieval.results",
    "ImageError": "errors",
    "InUseError": "errors",
    "ObjectStorage": "store.images.object_storage",
    "OptionError": "errors",
    "Page": "retrieval.results",
    "ProviderError": "errors",
    "SearchOptions": "retrieval.options",
    "ServerOptions": "store.server.connection",
    "StoreError": "errors",
    "StoredImageError": "errors",
    "TrainingError": "errors",
    "UniDiffError": "errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("unidiff-sdk")
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
