"""The settings of the server, and its API keys."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unidiff_sdk._internal.json_values import number_within, whole_number
from unidiff_sdk.errors import OptionError

__all__ = ["Access", "ApiKeys", "ServerSettings", "host_name"]

Access = Literal["read", "write"]
SMALLEST_KEY = 16  # characters; shorter keys can be guessed
_LINE = re.compile(r"(read|write)\s+([0-9a-f]{64})")


class ApiKeys:
    """API keys and what they allow. Only their SHA-256 hashes are kept.

    Args:
        keys: the access that each key grants.
        hashes: the access by the SHA-256 of a key, as 64 hexadecimal digits.

    Raises:
        OptionError: a key is too short or not printable ASCII.
    """

    def __init__(self, keys: Mapping[str, Access] | None = None, hashes: Mapping[str, Access] | None = None) -> None:
        for key in keys or {}:
            if len(key) < SMALLEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
                raise OptionError(
                    f"an API key has {len(key)} characters; give at least {SMALLEST_KEY} printable ASCII characters "
                    'without spaces, such as those of: python -c "import secrets; print(secrets.token_urlsafe(32))"'
                )
        self._access = {_digest(key): access for key, access in (keys or {}).items()} | dict(hashes or {})

    @classmethod
    def read(cls, file: Path) -> ApiKeys:
        """Read a file with lines "read HASH" or "write HASH", where HASH is the SHA-256 of a key. # starts a comment.

        Raises OptionError if the file cannot be read, a line has another form, or there is no key: whoever names a file
        of keys does not want a server without any.
        """
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{file}: cannot be read ({error})") from error
        hashes: dict[str, Access] = {}
        for number, line in enumerate(lines, start=1):
            if not (content := line.partition("#")[0].strip()):
                continue
            match = _LINE.fullmatch(content)
            if match is None:
                raise OptionError(
                    f'{file}, line {number}: give "read" or "write", and the SHA-256 of a key as this prints it: '
                    "printf %s KEY | sha256sum"
                )
            hashes[match[2]] = "read" if match[1] == "read" else "write"
        if not hashes:
            raise OptionError(f"{file}: there is no key in it. Omit it to serve without keys.")
        return cls(hashes=hashes)

    @property
    def hashes(self) -> dict[str, Access]:
        """The access by the SHA-256 of a key."""
        return dict(self._access)

    def __bool__(self) -> bool:
        return bool(self._access)

    def __or__(self, other: ApiKeys) -> ApiKeys:
        return ApiKeys(hashes=self._access | other._access)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._access)} keys)"

    def access_of(self, key: str) -> tuple[Access, str] | None:
        """What a key allows, and a short name for it in logs and limits. None for an unknown key.

        All hashes are compared, each in constant time, so the duration says nothing about the keys.
        """
        digest, found = _digest(key), None
        for known, access in self._access.items():
            if hmac.compare_digest(known, digest):
                found = (access, digest[:8])
        return found


def host_name(host: str) -> str:
    """The name in a Host header or an option: in lower case, without the port."""
    return re.sub(r":\d*$", "", host.lower())


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers.

    Attributes:
        keys: API keys. Without any, everyone who reaches the server may read.
        allow_writes: whether requests may change the catalog. With keys, it takes a write key as well.
        origins: the origins that browsers may call the API from (CORS), such as "https://shop.example".
        hosts: the names that requests may address the server by, without the port. Default: any. Without keys, they
            keep a page elsewhere from reading a server on this machine through a name that it points here.
        max_body: the largest body of a request, in bytes.
        rate: requests per second that one key, or one address without keys, may make on average; twice as many at once.
            0: no limit.
        max_searches: searches at the same time. One more is refused with 429.
        max_generations: generations at the same time, running or waiting. One more is refused with 429.
        max_images: images that one request may generate, including candidates.
        max_size: the largest width and height that a request may ask for, in pixels. The model's own size is allowed.
        timeout: seconds until a request is cancelled with 504. A generation ends between two steps.
        log_texts: whether logs contain queries and prompts.
        storefront: whether the page is served at "/".
        owner: the keys of the routes under /v1/local, which the commands of the same user call. Default: no routes.

    Raises:
        OptionError: a value is out of range.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    allow_writes: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 32 << 20
    rate: float = 0.0
    max_searches: int = 64
    max_generations: int = 16
    max_images: int = 64
    max_size: int = 1024
    timeout: float = 120.0
    log_texts: bool = False
    storefront: bool = True
    owner: ApiKeys = field(default_factory=ApiKeys)

    def __post_init__(self) -> None:
        for name in ("max_body", "max_searches", "max_generations", "max_images", "max_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), at_least=1))
        number_within("timeout", self.timeout, 0.001, 86_400, OptionError)
        number_within("rate", self.rate, 0, 1_000_000, OptionError)
        object.__setattr__(self, "hosts", tuple(map(host_name, self.hosts)))
        for origin in self.origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise OptionError(f"{origin!r:.80} is not an origin: give https://HOST or https://HOST:PORT")

    def may_write(self, access: Access | None) -> bool:
        """Whether a request with this access may change the catalog. None: there are no keys."""
        return self.allow_writes and access != "read"
