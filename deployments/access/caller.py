"""The caller of a request and the caller's own deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """The name of the caller's key, and the seconds the caller waits."""

    key: str | None = None
    """Name of the caller's key, None where the server asks for none."""
    deadline_s: float = math.inf
    """Seconds the caller waits."""


ANONYMOUS = Caller()
