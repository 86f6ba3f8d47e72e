"""Bulk jobs on Ray: indexing a dataset and generating from a list of prompts, on one machine or a cluster.

    from unidiff_sdk.scale import generate, index

    report = index("shards/", "http://qdrant:6333", images="s3://bucket/shop", workers=8)
    report = generate("prompts.txt", "generated/", "bundles/shop", best_of=4, workers=8)

The extra `ray` is needed. Without a cluster, Ray runs on this machine.
"""

from __future__ import annotations

from .generating import BulkGeneration, generate
from .indexing import index

__all__ = ["BulkGeneration", "generate", "index"]
