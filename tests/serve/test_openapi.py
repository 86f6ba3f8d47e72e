"""Requests made from the OpenAPI document: no answer is a server error, and all are as the document describes them."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="needs the dev extra")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from schemathesis import openapi
from schemathesis.python import asgi
from serving.fuzzing import Known, Tally, fuzz

from unidiff_sdk import Catalog
from unidiff_sdk.serve import ServerSettings, create_app

EXAMPLES = 12  # of each operation, and as many that break its schema


def test_answers_are_as_the_document_describes_them(own_catalog: Catalog) -> None:
    """Valid and invalid requests of every operation, the same in each run."""
    hits = own_catalog.browse(limit=12)
    known = Known([hit.id for hit in hits], base64.b64encode(hits[0].image_bytes()).decode())
    app = create_app(own_catalog, ServerSettings(allow_writes=True, max_images=1, max_size=64))
    schema, tally = openapi.from_asgi("/v1/openapi.json", app), Tally()
    with asgi.get_client(app) as client:
        fuzz(schema, known, EXAMPLES, number=0, tally=tally, session=client)
    assert not tally.failures, "\n\n".join(tally.failures.values())
    succeeded = {operation for operation, _, status in tally.statuses if status < 300}
    assert succeeded >= {result.ok().label for result in schema.get_all_operations()} - {"POST /v1/images/edits"}
    assert tally.total > 250
