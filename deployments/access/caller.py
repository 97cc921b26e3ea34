"""Who asks, and how long they wait."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """What the HTTP layer knows of a request beside its body."""

    key: str | None = None
    """Name of the caller's key, None where the server asks for none."""
    deadline_s: float = math.inf
    """Seconds the caller waits."""


ANONYMOUS = Caller()
