"""One shard of Qdrant Edge: its parameters, opening or creating it, and its payload indexes."""

from __future__ import annotations

from pathlib import Path

import qdrant_edge as edge

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk._internal.memory import require_free_space
from unidiff_sdk.errors import StoreError
from unidiff_sdk.store.protocol import MAX_DELETED_SHARE, VECTOR

from .growth import ESSENTIAL, opening_growth
from .page_cache import warm_page_cache
from .quantization import vector_parameters
from .shard_versions import CONFIG

__all__ = [
    "FULL_SCAN_KB",
    "INDEX_TYPES",
    "TEXT_INDEX",
    "index_kinds_of",
    "mirror_indexes",
    "open_shard",
    "stored_full_scan_kb",
]

INDEX_TYPES = {
    "keyword": edge.PayloadSchemaType.Keyword,
    "float": edge.PayloadSchemaType.Float,
    "bool": edge.PayloadSchemaType.Bool,
    "datetime": edge.PayloadSchemaType.Datetime,
    "geo": edge.PayloadSchemaType.Geo,
    "text": edge.PayloadSchemaType.Text,
}
# `scoring` stores what BM25 needs, in addition to what `contains` needs.
TEXT_INDEX = edge.TextIndexParams(tokenizer=edge.TokenizerType.Word, lowercase=True, scoring=True)

# The HNSW graph: links per item, and candidates per item while it is built. Both are the engine's usual values.
_LINKS, _EF_CONSTRUCT = 16, 100

# Items that match a filter are scanned if their vectors are no larger than this: 20,000 vectors of 512 numbers. Above
# that, the graph is searched with ACORN (Patel et al. 2024), which steps over items that do not match. Without ACORN,
# few matching items are linked to each other: where 10 % matched, 3 of 10 hits were found.
FULL_SCAN_KB = 40_000


def open_shard(path: Path, dim: int, quantization: str | None, full_scan_kb: int) -> edge.EdgeShard:
    """Load the shard in a folder, or create one for vectors of `dim` numbers."""
    if (path / CONFIG).is_file():
        stored = read_json(path / CONFIG, error=StoreError)["vectors"][VECTOR]["size"]
        if stored != dim:
            raise StoreError(
                f"The shard {path} has vectors of {stored} numbers, but the bundle of this catalog makes {dim}. "
                "Restore the folder from a backup."
            )
        require_free_space(path, opening_growth(path), "opening a catalog", reserve=ESSENTIAL)
        warm_page_cache(path)
        return edge.EdgeShard.load(str(path))
    require_free_space(path, 0, "a new catalog")
    path.mkdir(parents=True, exist_ok=True)
    vectors = {VECTOR: edge.EdgeVectorParams(dim, edge.Distance.Dot, **vector_parameters(quantization))}
    graph = edge.HnswIndexConfig(_LINKS, _EF_CONSTRUCT, full_scan_kb)
    # By default, the engine keeps deleted vectors in graphs of fewer than 1,000, which exist above 2,560 dimensions.
    removal = edge.EdgeOptimizersConfig(deleted_threshold=MAX_DELETED_SHARE, vacuum_min_vector_number=1)
    return edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=vectors, hnsw_config=graph, optimizers=removal))


def stored_full_scan_kb(path: Path) -> int:
    """The limit for scans in a shard's configuration file, in kilobytes of vectors. 0: it states none.

    Shards of earlier releases state none. The engine has a limit of its own for them, which is not known here.
    """
    graph = read_json(path / CONFIG, error=StoreError).get("hnsw_config") or {}
    return int(graph.get("full_scan_threshold", 0))


def index_kinds_of(shard: edge.EdgeShard) -> dict[str, str]:
    """The payload indexes of a shard: column -> kind."""
    kinds = {value: kind for kind, value in INDEX_TYPES.items()}
    schema = shard.info().payload_schema
    return {column: kinds[index.data_type] for column, index in schema.items() if index.data_type in kinds}


def mirror_indexes(source: edge.EdgeShard, target: edge.EdgeShard) -> None:
    """Give `target` the payload indexes of `source`. They differ if one was created or dropped meanwhile."""
    wanted, existing = source.info().payload_schema, target.info().payload_schema
    for column in existing.keys() - wanted.keys():
        target.update(edge.UpdateOperation.delete_field_index(column))
    for column, index in wanted.items():
        if column not in existing or existing[column].data_type != index.data_type:
            schema = index.params or index.data_type
            target.update(edge.UpdateOperation.create_field_index(column, schema))
