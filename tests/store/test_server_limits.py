"""What a cluster offers beyond one server: ordering, consistency, aliases; and requests that strict mode refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse
from support.backends import DIM, record
from support.local_qdrant import URL, use_local_qdrant
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, ForbiddenError, OptionError, ServerOptions, StoreError
from unidiff_sdk.store.filters import parse
from unidiff_sdk.store.server.store import ServerStore


def refusal(status: int, message: str) -> UnexpectedResponse:
    content = json.dumps({"status": {"error": message}}).encode()
    return UnexpectedResponse(status, "refused", content, httpx.Headers())


def strict_client(limit: int, status: int, fails_after: int = 1_000_000) -> Any:
    """A local client whose collection stores at most `limit` points in a request; later ones fail with 500."""
    client, stored = QdrantClient(":memory:"), [0]

    def upsert(collection: str, points: list[models.PointStruct], **options: Any) -> Any:
        if len(points) > limit:
            message = f'Limit exceeded {len(points)} > {limit} for "upsert limit". Help: Reduce the limit.'
            raise refusal(status, message if status != 413 else "Payload too large")
        stored[0] += len(points)
        if stored[0] > fails_after:
            raise refusal(500, "disk failure")
        return QdrantClient.upsert(client, collection, points, **options)

    double = Mock(wraps=client)
    double.upsert = upsert
    return double


@pytest.mark.parametrize("status", [400, 403, 413])
@pytest.mark.parametrize("limit", [1, 7, 64])
def test_upserts_are_split_to_what_the_server_allows(limit: int, status: int) -> None:
    store = ServerStore(strict_client(limit, status), "shop", DIM, "aaaa")
    records = [record(number, price=number) for number in range(50)]
    store.upsert(records)
    assert {found.id for batch in store.scroll() for found in batch} == {each.id for each in records}


def test_part_of_a_failed_upsert_stays_and_can_be_repeated() -> None:
    client = strict_client(4, 400, fails_after=12)
    store, records = ServerStore(client, "shop", DIM, "aaaa"), [record(number) for number in range(32)]
    with pytest.raises(StoreError, match="disk failure"):
        store.upsert(records)
    assert 0 < store.count() < 32 and store.revision == 1, "what was counted before is out of date"
    client.upsert = lambda *arguments, **options: client._mock_wraps.upsert(*arguments, **options)
    store.upsert(records)
    assert store.count() == 32


@pytest.mark.parametrize("status", [400, 403])
def test_limit_of_strict_mode_is_no_question_of_the_key(status: int) -> None:
    client = Mock(wraps=QdrantClient(":memory:"))
    store = ServerStore(client, "shop", DIM, "aaaa")
    client.count = Mock(
        side_effect=refusal(status, 'Index required but not found for "price". Help: Create an index for this key.')
    )
    with pytest.raises(StoreError, match=r"Index required.*strict mode") as raised:
        store.count(parse({"price": {"lt": 3}}))
    assert not isinstance(raised.value, ForbiddenError) and "api_key" not in str(raised.value)


def test_refused_single_point_is_an_error() -> None:
    store = ServerStore(strict_client(0, 400), "shop", DIM, "aaaa")
    with pytest.raises(StoreError, match="strict mode"):
        store.upsert([record(1)])


# ------------------------------------------------------------------------------------------------ options


def test_ordering_and_consistency_are_sent_with_each_request() -> None:
    client = Mock(wraps=QdrantClient(":memory:"))
    options = ServerOptions(ordering="strong", consistency="majority", write_replicas=2)
    store = ServerStore(client, "shop", DIM, "aaaa", options)
    assert client.create_collection.call_args.kwargs["write_consistency_factor"] == 2
    store.upsert([record(1, color="red")])
    store.delete([record(2).id])
    for write in (client.upsert, client.delete):
        assert write.call_args.kwargs["ordering"] == models.WriteOrdering.STRONG
        assert write.call_args.kwargs["wait"] is True
    store.retrieve([record(1).id])
    list(store.scroll())
    store.query(record(1).vector, limit=1)
    store.facet("color", "keyword", limit=5)
    for read in (client.retrieve, client.scroll, client.query_batch_points, client.facet):
        assert read.call_args.kwargs["consistency"] == models.ReadConsistencyType.MAJORITY, read


def test_default_options_send_neither() -> None:
    client = Mock(wraps=QdrantClient(":memory:"))
    store = ServerStore(client, "shop", DIM, "aaaa")
    store.upsert([record(1)])
    store.retrieve([record(1).id])
    assert "ordering" not in client.upsert.call_args.kwargs and "consistency" not in client.retrieve.call_args.kwargs


@pytest.mark.parametrize(
    "options",
    [
        {"ordering": "strict"},
        {"ordering": 1},
        {"consistency": "most"},
        {"consistency": 0},
        {"consistency": 1.5},
        {"consistency": True},
        {"write_replicas": 0},
        {"timeout": None},
        {"timeout": 10**400},
        {"retries": 10**400},
        {"shards": 2**31},
        {"grpc_port": 65_536, "grpc": True},
        {"alias": ""},
        {"alias": "a/b"},
        {"alias": 3},
    ],
    ids=str,
)
def test_invalid_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ServerOptions(**options)


# ------------------------------------------------------------------------------------------------ aliases


def test_alias_follows_a_reindexing(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = use_local_qdrant(monkeypatch)
    server = ServerOptions(alias="shop-live")
    with Catalog(URL, toy, images=tmp_path / "images", collection="shop", server=server) as catalog:
        catalog.add([np.full((4, 4, 3), shade, np.uint8) for shade in range(3)], ids=[0, 1, 2])
        assert client.get_aliases().aliases[0].collection_name == "shop"
        assert client.count("shop-live").count == 3
        other = make_toy_bundle(tmp_path / "other", seed=9)
        assert catalog.reindex(other) == 3
        (alias,) = client.get_aliases().aliases
        assert alias.collection_name == f"shop-{catalog.bundle.fingerprint[:12]}"
        assert client.count("shop-live").count == 3
    client.update_collection_aliases(
        [models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name="shop-live"))]
    )
    Catalog(URL, other, images=tmp_path / "images", collection="shop", server=server).close()
    assert client.count("shop-live").count == 3, "opening restores what a killed process left out"


def test_alias_of_another_catalog_is_not_taken(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = use_local_qdrant(monkeypatch)
    server = ServerOptions(alias="live")
    Catalog(URL, toy, images=tmp_path / "a", collection="shop", server=server).close()
    with pytest.raises(StoreError, match=r"leads to the collection \"shop\".*Choose another name"):
        Catalog(URL, toy, images=tmp_path / "b", collection="other", server=server)
    assert client.get_aliases().aliases[0].collection_name == "shop"
    with pytest.raises(StoreError, match="already exists"):
        Catalog(URL, toy, images=tmp_path / "c", collection="third", server=ServerOptions(alias="shop"))
