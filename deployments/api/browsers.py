"""Whether a browser lets another site's pages read our replies (CORS, the Fetch standard, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.api.raw import SEED_HEADER

READABLE_HEADERS = (
    "x-request-id",
    "x-backend",
    "x-precision",
    "x-prompt-tokens",
    SEED_HEADER,
    "server-timing",
    "retry-after",
)


def cors(origins: Sequence[str]) -> dict[str, Any]:
    """Arguments of Starlette's CORSMiddleware. Keys travel in a header, so cookies are never needed."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "HEAD", "POST"],
        "allow_headers": ["*"],
        "expose_headers": list(READABLE_HEADERS),
        "max_age": 3600,
    }
