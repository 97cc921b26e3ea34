"""Keys and rates are checked before a body is parsed (API-2); errors are answered in the contract's form."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from deployments.access.caller import Caller
from deployments.access.keys import KeyRing, Loopback
from deployments.access.limits import UsageLimiter
from deployments.api.errors import answer
from deployments.api.scope import CONTENT_TYPE, KEY_NAME, request_id_of

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Answer = Callable[[BaseException, str], Response]
"""An exception and the request's id -> the reply."""


class Admission:
    """Admits requests with a valid key within its rate; without keys, connections to loopback addresses."""

    def __init__(self, keys: KeyRing | Loopback, limiter: UsageLimiter) -> None:
        self._keys = keys
        self._limiter = limiter

    async def check(self, request: Request) -> None:
        """Leave the name of the request's key in its scope.

        Raises:
            UnauthorizedError: no key or a wrong one.
            RateLimitedError: too many requests with this key; only POSTs count.
        """
        key = self._keys.identify(request.scope)
        request.scope[KEY_NAME] = key
        if key is not None and request.method == "POST":
            await self._limiter.request(key)

    def route_class(self, answer: Answer = answer) -> type[APIRoute]:
        """A route that asks this admission first; FastAPI's own dependencies come after the body is parsed.

        `answer` makes the dialect's reply to an exception.
        """
        admission = self

        class AdmittingRoute(APIRoute):
            def get_route_handler(self) -> Handler:
                handle = super().get_route_handler()

                async def admit(request: Request) -> Response:
                    # Starlette answers unexpected exceptions too, but then raises them again, and Serve logs a crash.
                    try:
                        await admission.check(request)
                        return await handle(_as_json(request))
                    except Exception as error:
                        return answer(error, request_id_of(request.scope))

                return admit

        return AdmittingRoute


def _as_json(request: Request) -> Request:
    """The request with its body declared JSON, whatever the client calls it: `curl -d` says it sends a form.

    Routes that do take forms (`forms.py`) find in its scope what the client called it.
    """
    request.scope[CONTENT_TYPE] = request.headers.get("content-type", "")
    kept = [(name, value) for name, value in request.scope["headers"] if name.lower() != b"content-type"]
    return Request({**request.scope, "headers": [*kept, (b"content-type", b"application/json")]}, request.receive)


def caller_of(request: Request) -> Caller:
    """The caller, with the timeout of the header that Serve's proxy also reads; an invalid timeout is ignored."""
    try:
        seconds = float(request.headers.get("x-request-timeout-seconds", "inf"))
    except ValueError:
        seconds = math.inf
    return Caller(request.scope.get(KEY_NAME), seconds if seconds > 0 else math.inf)
