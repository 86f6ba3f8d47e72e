"""qdrant-client's local mode in place of a server, for the code that opens a catalog by its URL."""

from __future__ import annotations

from typing import Any

import pytest

URL = "http://qdrant:6333"


def use_local_qdrant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let all connections share one local client, which outlives them. Returns it."""
    import qdrant_client

    class SharedClient(qdrant_client.QdrantClient):
        def close(self, *arguments: Any, **options: Any) -> None:
            """Keep the collections for the next connection."""

    client = SharedClient(":memory:")
    monkeypatch.setattr(qdrant_client, "QdrantClient", lambda **_: client)
    return client
