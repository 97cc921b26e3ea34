"""API keys, known by their hashes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import logging
import re
import stat
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
        ValueError: a line of another form, which is not repeated, for it may be a key; one key under two names; no
            keys; a file that every user of the machine may write; a folder or a pipe.
        OSError: the file cannot be read.
    """
    _check_access(path)
    keys: list[tuple[str, str]] = []
    names: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        match line.partition("#")[0].split():
            case []:
                continue
            case [name, digest] | [name, digest, "-" | "*-"] if _SHA256.fullmatch(digest):
                if names.setdefault(digest.lower(), name) != name:
                    raise ValueError(
                        f"{path} line {number}: the key of {name!r} is that of {names[digest.lower()]!r} too"
                    )
                keys.append((name, digest.lower()))
            case _:
                raise ValueError(f"{path} line {number}: expected '<name> <sha256 of the key in hex>'")
    if not keys:
        raise ValueError(
            f"{path} holds no key, so all requests would be refused. Add lines '<name> <sha256 of the key in hex>'"
        )
    return keys


def _check_access(path: Path) -> None:
    """Whoever can write the file can add a key; whoever can read it can guess short keys from their hashes."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a file. Name a file of lines '<name> <sha256 of the key in hex>'")
    if mode & stat.S_IWOTH:
        raise ValueError(f"every user of this machine may write {path} and so add a key: chmod o-rwx {path}")
    if mode & stat.S_IROTH:
        logger.warning("every user of this machine may read the hashes in %s: chmod o-rwx %s", path, path)


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class KeyRing:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Read the file; the errors are those of `read_key_hashes`."""
        self._path = path
        self._stamp = self._stamp_now()
        self._names = _names_by_hash(path)
        self._looked = time.monotonic()

    def identify(self, scope: Scope) -> str:
        """Name of the key of a request, given its ASGI scope.

        The key's hash is looked up, so the time of the look-up tells nothing useful about the keys (SEC-3).

        Raises:
            UnauthorizedError: no key or a wrong one.
        """
        self._reread()
        name = self._names.get(hashlib.sha256(_presented(Headers(scope=scope).get("authorization", ""))).hexdigest())
        if name is None:
            raise UnauthorizedError("missing or wrong API key")
        return name

    def _reread(self) -> None:
        now = time.monotonic()
        if now - self._looked < REREAD_S:
            return
        self._looked = now
        try:
            if (stamp := self._stamp_now()) != self._stamp:
                self._names, self._stamp = _names_by_hash(self._path), stamp
                logger.info("key file changed: %d keys read", len(self._names))
        except (OSError, ValueError) as error:  # who could ask before still can
            logger.error("the key file cannot be read, so the previous keys remain valid: %s", error)

    def _stamp_now(self) -> tuple[int, int, int, int]:
        status = self._path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


def _presented(authorization: str) -> bytes:
    """The key in an `authorization` header: a bearer token, or the password of Basic, whoever its user is.

    A Basic user without a password is taken for the key, as `curl -u KEY:` sends it.
    """
    scheme, _, credentials = authorization.partition(" ")
    presented = credentials.strip().encode("latin-1")
    if scheme.lower() == "bearer":
        return presented
    if scheme.lower() != "basic":
        return b""
    try:
        user, _, password = base64.b64decode(presented, validate=True).partition(b":")
    except binascii.Error:
        return b""
    return password or user


def _names_by_hash(path: Path) -> dict[str, str]:
    return {digest: name for name, digest in read_key_hashes(path)}


class Loopback:
    """No keys (`auth: none`): only connections to loopback addresses are accepted."""

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
