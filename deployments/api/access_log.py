"""One log line and one count for each request."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.scope import KEY_NAME, request_id_of
from deployments.telemetry.metrics import metrics

logger = logging.getLogger(__name__)

QUIET = ("/healthz", "/readyz", "/page/{asked}/{name}")
"""Routes that are logged at DEBUG only: probes and browsers request them so often that other lines would be lost."""
CLIENT_LEFT = 499
"""Status noted for a request whose client left before there was an answer (nginx's number)."""


class AccessLog:
    """Logs method, path, status, time and the name of the key. Serve's own access log is off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on; log it when it has ended, however it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), CLIENT_LEFT

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            seconds, key = time.perf_counter() - begin, scope.get(KEY_NAME) or "-"
            route = getattr(scope.get("route"), "path", "unknown")
            metrics().requests.inc(1, {"route": route, "status": str(status)})
            logger.log(
                logging.DEBUG if route in QUIET else logging.INFO,
                "%s %s %d %.0f ms key=%s",
                *(scope["method"], scope["path"], status, seconds * 1000, key),
                extra={"request_id": request_id_of(scope), "status": status, "key": key},
            )
