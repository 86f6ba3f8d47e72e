"""What tests with several processes share."""

from __future__ import annotations

import socket


def free_port() -> str:
    """A port of this machine that no process listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
