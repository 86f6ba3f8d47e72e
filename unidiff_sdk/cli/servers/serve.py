"""`unidiff serve`: a catalog over HTTP."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.cli.console import Command, echo
from unidiff_sdk.cli.locations.location import CatalogLocation, catalog_options
from unidiff_sdk.cli.locations.server_file import ServerFile
from unidiff_sdk.cli.parameters import trusted_key_option
from unidiff_sdk.errors import OptionError, ProviderError

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOCAL_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # of a server that listens at all addresses
KEY_VARIABLES = ("UNIDIFF_API_KEY", "UNIDIFF_READ_API_KEY")
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


@click.command(
    cls=Command,
    resuming="Requests that were running were finished.",
    short_help="Serve a catalog over HTTP, with a storefront.",
    epilog="""
    unidiff serve shop.catalog
    unidiff serve shop.catalog --allow-writes --port 9000
    unidiff serve shop.catalog --host 0.0.0.0 --api-keys keys.txt --rate 20
    unidiff serve http://localhost:6333 --image-store shop.images --workers 4
    """,
)
@click.argument("catalog")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port. 0: a free one.")
@click.option("--allow-writes", is_flag=True, help="Allow requests to add, change and delete items.")
@click.option("--api-key", "keys", multiple=True, envvar=KEY_VARIABLES[0], metavar="KEY", help="Key for all requests.")
@click.option(
    "--read-api-key", "read_keys", multiple=True, envvar=KEY_VARIABLES[1], metavar="KEY", help="Key for reading."
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
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="With a URL: processes that serve."
)
@click.option("--rate", default=0.0, help="Requests per second for each key or address. 0 (default): no limit.")
@click.option("--max-body", default=32, show_default=True, metavar="MIB", help="Largest body of a request.")
@click.option("--max-generations", default=16, show_default=True, help="Generations that run or wait at once.")
@click.option("--max-images", default=64, show_default=True, help="Images that one request may generate.")
@click.option("--max-size", default=1024, show_default=True, metavar="PX", help="Width and height of generated images.")
@click.option("--timeout", default=120.0, show_default=True, metavar="S", help="Seconds until a request is cancelled.")
@click.option("--log-texts", is_flag=True, help="Write queries and prompts into the log.")
@click.option("--storefront/--no-storefront", default=True, help="Whether to serve the page at /.")
@trusted_key_option
@catalog_options
def serve(
    catalog: CatalogLocation,
    host: str,
    port: int,
    keys: Sequence[str],
    read_keys: Sequence[str],
    key_file: Path | None,
    allowed_hosts: Sequence[str],
    workers: int,
    max_body: int,
    trusted_keys: Sequence[str] | None,
    **options: Any,
) -> None:
    """Serve CATALOG, a folder or the URL of a Qdrant server, over HTTP until Ctrl-C."""
    try:
        import uvicorn

        from unidiff_sdk.serve import ServerSettings, create_app
        from unidiff_sdk.serve.settings import ApiKeys
        from unidiff_sdk.serve.transport import process
    except ImportError as error:
        raise ProviderError(f"The server is not installed ({error}): pip install 'unidiff-sdk[serve]'") from error

    api_keys = ApiKeys(dict.fromkeys(read_keys, "read")) | ApiKeys(dict.fromkeys(keys, "write"))
    if key_file is not None:
        api_keys |= ApiKeys.read(key_file)
    if not api_keys and (blank := [name for name in KEY_VARIABLES if name in os.environ]):
        raise OptionError(f"{blank[0]} is empty. Set it to a key, or unset it to serve without keys.")
    hosts = (*LOOPBACK_NAMES, *allowed_hosts) if host in LOOPBACK and not api_keys else tuple(allowed_hosts)
    token = ServerFile.new_token()
    owner = ApiKeys() if catalog.is_url else ApiKeys({token: "read"})
    settings = ServerSettings(keys=api_keys, max_body=max_body << 20, hosts=hosts, owner=owner, **options)
    if host not in LOOPBACK and not api_keys:
        echo(f"Warning: everyone who reaches {host} may use this server. Give --api-key or --api-keys.", err=True)
    if workers > 1 and not catalog.is_url:
        raise OptionError(
            f"--workers {workers} needs the URL of a Qdrant server, because one process holds a catalog folder: serve "
            f"{catalog} with one worker, or keep its vectors in a server."
        )
    process.prepare()
    with catalog.open(trusted_keys=trusted_keys) as opened, ExitStack() as stack:
        if workers > 1:  # it was opened to report what is wrong with it; each process opens it for itself
            opened.close()
            port = port or _free_port(host)
            opening = catalog.opening() | {"trusted_keys": trusted_keys}
            os.environ |= process.worker_environment(catalog.place, opening, settings)
            _announce(host, port, f" with {workers} processes")
            options = process.uvicorn_options(host, port, settings)
            uvicorn.run(process.FACTORY, factory=True, workers=workers, **options)
            return
        process.load_encoders(opened)
        config = uvicorn.Config(create_app(opened, settings), **process.uvicorn_options(host, port, settings))

        def on_start(host: str, port: int) -> None:
            if owner:
                url = _url(LOCAL_ADDRESS.get(host, host), port)
                stack.enter_context(ServerFile(url, token, os.getpid()).written(opened.folder))
            _announce(host, port)

        _announced(uvicorn.Server(config), on_start).run()


def _announced(server: Any, on_start: Callable[[str, int], None]) -> Any:
    """Make a `uvicorn.Server` call a function with its host and port once it listens."""
    plain = server.startup

    async def startup(sockets: Any = None) -> None:
        await plain(sockets)
        if server.servers:  # it listens; otherwise it ends, and has logged why
            on_start(*server.servers[0].sockets[0].getsockname()[:2])

    server.startup = startup
    return server


def _announce(host: str, port: int, processes: str = "") -> None:
    echo(f"Serving at {_url(host, port)}{processes}  (Ctrl-C ends it)")
    sys.stdout.flush()


def _free_port(host: str) -> int:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise OptionError(f"--host {host}: cannot listen there ({error.strerror or error})") from error


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
