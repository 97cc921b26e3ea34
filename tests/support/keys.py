"""Keys of the tests, as a key file has them."""

from __future__ import annotations

import hashlib

ALICE = {"authorization": "Bearer secret"}
BOB = {"authorization": "Bearer other"}


def line(name: str, key: str) -> str:
    """A key's line."""
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"
