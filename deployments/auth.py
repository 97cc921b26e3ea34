"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Mapping
from pathlib import Path

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from pipelines.errors import SdgraphError


class UnauthorizedError(SdgraphError):
    """No key, or a wrong one."""


class RateLimitedError(SdgraphError):
    """Too many requests; `retry_after` is whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


def read_key_hashes(path: Path | None) -> dict[str, str]:
    """Names and SHA-256 hashes of the keys in a file of lines `<name> <hash in hex>`; empty without a file.

    Raises:
        ValueError: a line of another form. The line is not repeated: it may be a key.
    """
    if path is None:
        return {}
    keys: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digest = line.partition(" ")
        digest = digest.strip().lower()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{path} line {number}: expected '<name> <sha256 of the key in hex>'")
        keys[name] = digest
    return keys


class KeyRing:
    """Bearer keys, known by their hashes."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        """Accept the keys of `hashes` (name -> SHA-256 in hex); everybody when it is empty."""
        self._hashes = dict(hashes)

    def identify(self, authorization: str | None) -> str | None:
        """Name of the key in an `Authorization` header, None where no keys are asked for.

        Every known hash is compared in constant time, so that timing tells nothing.

        Raises:
            UnauthorizedError: no key or a wrong one.
        """
        if not self._hashes:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        names = [name for name, known in self._hashes.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not names:
            raise UnauthorizedError
        return names[0]


class RateLimit:
    """A moving window per caller, in this process's memory."""

    def __init__(self, rate: str | None) -> None:
        """Allow `rate` (`limits` notation, such as `60/minute`) to each caller; None allows everything."""
        self._rate = parse(rate) if rate else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def hit(self, caller: str) -> None:
        """Count a request; raises RateLimitedError when the window is full."""
        if self._rate is not None and not self._limiter.hit(self._rate, caller):
            reset = self._limiter.get_window_stats(self._rate, caller).reset_time
            raise RateLimitedError(max(1, math.ceil(reset - time.time())))
