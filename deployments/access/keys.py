"""API keys, known by their hashes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from pipelines.errors import SdgraphError

logger = logging.getLogger(__name__)

REREAD_S = 1.0
"""Seconds between looks at the key file: changes take effect within a second (of the mount's update, for a Secret)."""


class UnauthorizedError(SdgraphError):
    """No key, or a wrong one; the message is for the caller."""


def read_key_hashes(path: Path) -> list[tuple[str, str]]:
    """Names and SHA-256 hashes of the keys in a file of lines `<name> <hash in hex>`.

    A name may have several keys, so that one can be replaced without a gap. Read as editors and `sha256sum` write such
    files: spaces or tabs, `#` comments, a byte order mark, the `-` behind a hash of standard input.

    Raises:
        ValueError: a line of another form, which is not repeated, for it may be a key; or a file without keys.
        OSError: the file cannot be read.
    """
    keys: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        match line.partition("#")[0].split():
            case []:
                continue
            case [name, digest] | [name, digest, "-" | "*-"] if _SHA256.fullmatch(digest):
                keys.append((name, digest.lower()))
            case _:
                raise ValueError(f"{path} line {number}: expected '<name> <sha256 of the key in hex>'")
    if not keys:
        raise ValueError(
            f"{path} holds no key, so all requests would be refused. Add lines '<name> <sha256 of the key in hex>'"
        )
    return keys


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class KeyRing:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Read the file; the errors are those of `read_key_hashes`."""
        self._path = path
        self._stamp = self._stamp_now()
        self._keys = read_key_hashes(path)
        self._looked = time.monotonic()

    def identify(self, scope: Scope) -> str:
        """Name of the key of a request, given its ASGI scope.

        Every known hash is compared in constant time, so that timing tells nothing.

        Raises:
            UnauthorizedError: no key or a wrong one.
        """
        self._reread()
        authorization = Headers(scope=scope).get("authorization", "")
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        names = [name for name, known in self._keys if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not names:
            raise UnauthorizedError("missing or wrong API key")
        return names[0]

    def _reread(self) -> None:
        now = time.monotonic()
        if now - self._looked < REREAD_S:
            return
        self._looked = now
        try:
            if (stamp := self._stamp_now()) != self._stamp:
                self._keys, self._stamp = read_key_hashes(self._path), stamp
                logger.info("key file changed: %d keys read", len(self._keys))
        except (OSError, ValueError) as error:  # who could ask before still can
            logger.error("key file not readable, the keys stay as they were: %s", error)

    def _stamp_now(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size


class Loopback:
    """No keys (`auth: none`): everybody on this machine may ask, nobody else."""

    def identify(self, scope: Scope) -> None:
        """Accept a connection that was made to a loopback address.

        Raises:
            UnauthorizedError: it was made to another one: the server listens where others can reach it.
        """
        host = (scope.get("server") or ("", None))[0]
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if not local:
            raise UnauthorizedError(
                "This server has no API keys configured and only accepts loopback connections "
                f"(got {host!r}). Set SDGRAPH_API_KEYS_FILE."
            )
