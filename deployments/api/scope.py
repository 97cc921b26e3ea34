"""Values that layers of the application pass to each other in a request's ASGI scope."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

KEY_NAME = "sdgraph.key"
"""Name of the request's API key, once it was checked; None where no keys are asked for."""

CONTENT_TYPE = "sdgraph.content-type"
"""What the client called its body, which every route but those that take forms reads as JSON."""


def request_id_of(scope: Scope) -> str:
    """The id of a request. Serve's proxy takes `x-request-id` from the client or makes one, and sends it back."""
    return Headers(scope=scope).get("x-request-id", "unknown")[:128]
