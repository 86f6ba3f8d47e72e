"""`unidiff serve`: a catalog over HTTP."""

from __future__ import annotations

import json
import logging
import resource
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.errors import OptionError, ProviderError

from .console import Command, echo
from .parameters import trusted_key_option

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


@click.command(
    cls=Command,
    resuming="Requests that were running were finished.",
    short_help="Serve a catalog over HTTP, with a storefront.",
    epilog="""
    unidiff serve shop.catalog
    unidiff serve shop.catalog --allow-writes --port 9000
    unidiff serve shop.catalog --host 0.0.0.0 --api-keys keys.txt --rate 20
    unidiff serve http://localhost:6333 --images shop.images
    """,
)
@click.argument("catalog")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port. 0: a free one.")
@click.option("--allow-writes", is_flag=True, help="Allow requests to add, change and delete items.")
@click.option("--api-key", "keys", multiple=True, envvar="UNIDIFF_API_KEY", metavar="KEY", help="Key for all requests.")
@click.option(
    "--read-api-key", "read_keys", multiple=True, envvar="UNIDIFF_READ_API_KEY", metavar="KEY", help="Key for reading."
)
@click.option(
    "--api-keys", "key_file", type=click.Path(path_type=Path), help='File with lines "read HASH" or "write HASH".'
)
@click.option("--origin", "origins", multiple=True, metavar="URL", help="Origin that browsers may call the API from.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Name that requests may address the server by. Default: localhost without keys, else any.",
)
@click.option("--rate", default=0.0, help="Requests per second for each key or address. 0 (default): no limit.")
@click.option("--max-body", default=32, show_default=True, metavar="MIB", help="Largest body of a request.")
@click.option("--max-generations", default=16, show_default=True, help="Generations that run or wait at once.")
@click.option("--max-images", default=64, show_default=True, help="Images that one request may generate.")
@click.option("--max-size", default=1024, show_default=True, metavar="PX", help="Width and height of generated images.")
@click.option("--timeout", default=120.0, show_default=True, metavar="S", help="Seconds until a request is cancelled.")
@click.option("--log-texts", is_flag=True, help="Write queries and prompts into the log.")
@click.option("--storefront/--no-storefront", default=True, help="Whether to serve the page at /.")
@click.option("--images", type=click.Path(path_type=Path), help="With a URL: folder of the images.")
@click.option("--collection", help="With a URL: name of the collection.")
@click.option("--qdrant-api-key-file", type=click.Path(path_type=Path), help="With a URL: file with its API key.")
@trusted_key_option
def serve(
    catalog: str,
    host: str,
    port: int,
    keys: Sequence[str],
    read_keys: Sequence[str],
    key_file: Path | None,
    allowed_hosts: Sequence[str],
    max_body: int,
    images: Path | None,
    collection: str | None,
    qdrant_api_key_file: Path | None,
    trusted_keys: Sequence[str] | None,
    **options: Any,
) -> None:
    """Serve CATALOG, a folder or the URL of a Qdrant server, over HTTP until Ctrl-C."""
    try:
        import uvicorn

        from unidiff_sdk.serve import ServerSettings, create_app
        from unidiff_sdk.serve.settings import ApiKeys
        from unidiff_sdk.serve.transport.protocol import TimedProtocol
    except ImportError as error:
        raise ProviderError(f"The server is not installed ({error}): pip install 'unidiff-sdk[serve]'") from error
    from unidiff_sdk.catalog.catalog import Catalog

    api_keys = ApiKeys(dict.fromkeys(read_keys, "read")) | ApiKeys(dict.fromkeys(keys, "write"))
    if key_file is not None:
        api_keys |= ApiKeys.read(key_file)
    hosts = (*LOOPBACK_NAMES, *allowed_hosts) if host in LOOPBACK and not api_keys else tuple(allowed_hosts)
    settings = ServerSettings(keys=api_keys, max_body=max_body << 20, hosts=hosts, **options)
    if host not in LOOPBACK and not api_keys:
        echo(f"Warning: everyone who reaches {host} may use this server. Give --api-key or --api-keys.", err=True)
    remote = {"images": images, "collection": collection, "api_key": _key_in(qdrant_api_key_file)}
    opening: dict[str, Any] = {name: value for name, value in remote.items() if value is not None}
    if opening and "://" not in catalog:
        raise OptionError(f"{', '.join(opening)} need a URL, but {catalog} is a folder.")
    _log_to_stderr()
    _allow_connections()
    with Catalog(catalog, create=False, trusted_keys=trusted_keys, **opening) as opened:
        config = uvicorn.Config(
            create_app(opened, settings),
            host=host,
            port=port,
            http=TimedProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, int(settings.timeout)),
            h11_max_incomplete_event_size=64 << 10,
        )
        _announced(uvicorn.Server(config)).run()


def _announced(server: Any) -> Any:
    """Make a `uvicorn.Server` print its address once it listens."""
    plain = server.startup

    async def startup(sockets: Any = None) -> None:
        await plain(sockets)
        for each in server.servers:
            for socket in each.sockets:
                host, port, *_ = socket.getsockname()
                echo(f"Serving at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)")
                sys.stdout.flush()

    server.startup = startup
    return server


def _key_in(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: cannot be read ({error})") from error


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
