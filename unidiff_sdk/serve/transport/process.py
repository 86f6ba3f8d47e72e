"""What a process that serves sets up: logs, open files, models; and the application of each of several processes."""

from __future__ import annotations

import atexit
import json
import logging
import os
import resource
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from unidiff_sdk._internal.text import Secret
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.serve.app import create_app
from unidiff_sdk.serve.settings import ApiKeys, ServerSettings

from .protocol import TimedProtocol

__all__ = ["FACTORY", "create_worker", "load_encoders", "prepare", "uvicorn_options", "worker_environment"]

FACTORY = f"{__name__}:create_worker"
VARIABLE = "UNIDIFF_SERVER"


def prepare() -> None:
    """Set up the logs and the limits of this process."""
    _log_to_stderr()
    _allow_connections()


def load_encoders(catalog: Catalog) -> None:
    """Load what searches need before a generation does: its threads start others of low priority only."""
    for graph in ("text_encoder", "clip_text_encoder", "image_encoder"):
        if catalog.bundle.has_graph(graph):
            catalog.bundle.session(graph)


def uvicorn_options(host: str, port: int, settings: ServerSettings) -> dict[str, Any]:
    """The options of uvicorn."""
    return {
        "host": host,
        "port": port,
        "http": TimedProtocol,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": max(1, int(settings.timeout)),
        "h11_max_incomplete_event_size": 64 << 10,
    }


def worker_environment(location: str, opening: Mapping[str, Any], settings: ServerSettings) -> dict[str, str]:
    """The environment from which `create_worker` makes the same application.

    Of the keys of this server it holds hashes only, of the Qdrant server the key: only this user can read it.

    Args:
        location: the URL of the catalog.
        opening: the other arguments of `Catalog`.
        settings: of the server.
    """
    described = asdict(settings) | {"keys": settings.keys.hashes, "owner": settings.owner.hashes}
    plain = {name: value.reveal() if isinstance(value, Secret) else value for name, value in opening.items()}
    content = {"location": location, "opening": plain, "settings": described}
    return {VARIABLE: json.dumps(content, default=str)}  # a folder as its path


def create_worker() -> FastAPI:
    """The application of one of several processes, which opens the catalog for itself."""
    described = json.loads(os.environ[VARIABLE])
    options = described["settings"]
    options |= {name: tuple(options[name]) for name in ("origins", "hosts")}
    options |= {name: ApiKeys(hashes=options[name]) for name in ("keys", "owner")}
    prepare()
    catalog = Catalog(described["location"], create=False, **described["opening"])
    atexit.register(catalog.close)
    load_encoders(catalog)
    return create_app(catalog, ServerSettings(**options))


def _allow_connections() -> None:
    """Raise the limit of open files to what the system allows: each connection is one, and idle ones are cheap."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_to_stderr() -> None:
    """Write the access log, warnings and errors of the server to the standard error, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("unidiff_sdk.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if name.startswith("unidiff") else logging.WARNING)
        logger.propagate = False
    # Every occurrence: Python remembers the text of each warning that it shows only once, without end.
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = _log_warning


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    logging.getLogger("unidiff_sdk.serve").warning("%s", json.dumps({"warning": str(message)}))
