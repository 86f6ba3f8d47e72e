"""Requests made from the OpenAPI document of a server: those that it describes, and those that it excludes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema

__all__ = ["Known", "Tally", "fuzz"]

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


@dataclass(frozen=True)
class Known:
    """What the catalog holds. Random ids and images never reach the code behind the first check.

    Attributes:
        ids: ids of items. Every second request has the first; the last ones are deleted.
        image: an image in base64.
    """

    ids: list[str]
    image: str


@dataclass
class Tally:
    """The requests that were sent.

    Attributes:
        statuses: how many of each operation, mode ("positive": the document describes it) and status.
        failures: what is wrong with answers, by operation and check, each with one example.
    """

    statuses: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of requests."""
        return self.statuses.total()

    def add(self, case: Case, mode: str, response: Response) -> None:
        """Count a request, and check its answer against the document."""
        self.statuses[case.operation.label, mode, response.status_code] += 1
        try:
            case.validate_response(response, checks=list(CHECKS))
        except BaseExceptionGroup as group:
            for failure in group.exceptions:
                found = f"{failure}\n{case.as_curl_command()}"
                self.failures.setdefault((case.operation.label, type(failure).__name__), found)


def fuzz(schema: OpenApiSchema, known: Known, examples: int, *, number: int, tally: Tally, session: Any = None) -> None:
    """Send requests to all operations of a server.

    Args:
        schema: the document of the server, as schemathesis loads it.
        known: what requests may refer to.
        examples: requests of each operation and mode, at most.
        number: the seed. The same number makes the same requests.
        tally: counts them.
        session: a client to send them with.
    """
    for result in schema.get_all_operations():
        for mode in GenerationMode:
            _fuzz_operation(result.ok(), mode, known, examples, number, tally, session)


def _fuzz_operation(
    operation: Any, mode: GenerationMode, known: Known, examples: int, number: int, tally: Tally, session: Any
) -> None:
    sent = 0

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        nonlocal sent
        sent += 1
        if mode is GenerationMode.POSITIVE and sent % 2:
            _refer_to(case, known)
        if isinstance(case.body, dict) and "prompt" in case.body and type(case.body.get("steps", 1)) is int:
            case.body["steps"] = 1  # otherwise generating takes as long as all other requests together
        tally.add(case, mode.value, case.call(session=session))

    try:
        send()
    except Unsatisfiable:  # nothing breaks the schema of an operation without arguments
        if mode is GenerationMode.POSITIVE:
            raise


def _refer_to(case: Case, known: Known) -> None:
    """Let a request refer to an item of the catalog, and hold an image that can be read."""
    if "id" in case.path_parameters:
        case.path_parameters["id"] = known.ids[-1 if case.method == "DELETE" else 0]
    if not isinstance(case.body, dict):
        return
    for name in ("image", "mask"):
        if isinstance(case.body.get(name), str):
            case.body[name] = known.image
    items = case.body.get("items")
    for item in items if isinstance(items, list) else ():  # a form has them as one text
        item["image"] = known.image
    for name in ("like", "unlike"):
        if case.body.get(name) is not None:
            case.body[name] = known.ids[0]
    if case.operation.path == "/v1/search":  # more members are hardly ever valid together
        case.body = {"text": "boots"} | {name: case.body[name] for name in ("image", "like") if name in case.body}
