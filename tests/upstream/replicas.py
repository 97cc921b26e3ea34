"""Tiny deployments, an autoscaling policy and a proxy middleware: what `test_ray.py` runs on a real Ray instance."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ray_compat import DeploymentStates, current_request_id, gpu_share

REPLICAS = "wanted_replicas"
"""What `Worker` reports to `as_many_as_reported`."""


class OnPurposeError(Exception):
    """What `Worker.fail` raises."""


class ShareHolder:
    """A plain actor that was given some share of a GPU, or none."""

    def gpu_share(self) -> float:
        return gpu_share()


class Worker:
    """Does in a replica whatever a test wants to see there."""

    def __init__(self) -> None:
        self._released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._begun: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ended: defaultdict[str, asyncio.Future[str]] = defaultdict(asyncio.Future)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._counter = Counter("upstream_calls", "Calls.", ("kind",))
        self._gauge = Gauge("upstream_level", "A level.")
        self._histogram = Histogram("upstream_seconds", "Times.", boundaries=[1, 10])

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {REPLICAS: 2.0}

    async def pid(self) -> int:
        return os.getpid()

    async def request_id(self) -> str:
        return current_request_id()

    async def measure(self) -> None:
        """One call, a level of 7, and a time of 2 s."""
        self._counter.inc(1, {"kind": "plain"})
        self._gauge.set(7)
        self._histogram.observe(2)

    async def echo(self, *, value: Any) -> tuple[str, Any]:
        """What came, and its type."""
        return type(value).__name__, value

    async def fail(self) -> None:
        raise OnPurposeError("on purpose")

    async def block(self, *, name: str) -> str:
        """Return `name` when it is released; `ended` tells of an exception."""
        self._begun[name].set()
        try:
            await self._released[name].wait()
        except BaseException as error:
            self._ended[name].set_result(type(error).__name__)
            raise
        return name

    async def release(self, *, name: str) -> None:
        self._released[name].set()

    async def begun(self, *, name: str) -> None:
        """Return when `block` of this name runs."""
        await self._begun[name].wait()

    async def ended(self, *, name: str) -> str:
        """Name of the exception that ended a `block` or a `count`; waits for it."""
        return await self._ended[name]

    async def count(self, *, name: str) -> AsyncGenerator[int, None]:
        """0, 1, 2 and so on for ever."""
        try:
            while True:
                yield self._counts[name]
                self._counts[name] += 1
                await asyncio.sleep(0.01)
        except BaseException as error:
            self._ended[name].set_result(type(error).__name__)
            raise

    async def counted(self, *, name: str) -> int:
        """How far `count` has come."""
        return self._counts[name]


class Front:
    """An ingress that makes its application by itself, as ours does."""

    def __init__(self, *, worker: DeploymentHandle | None = None, sleeper: DeploymentHandle | None = None) -> None:
        self._worker = worker
        self._sleeper = sleeper

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()
        builder = os.getpid()

        async def answered(_: Request, error: Exception) -> Response:
            return JSONResponse({"error": str(error)}, 500)

        app.add_exception_handler(Exception, answered)

        @app.get("/pids")
        async def pids() -> dict[str, int]:
            return {"builder": builder, "replica": os.getpid()}

        @app.get("/states")
        async def states() -> dict[str, Any]:
            healthy, named = await DeploymentStates()()
            return {"healthy": healthy, "states": named}

        @app.get("/ids")
        async def ids() -> list[str]:
            assert self._worker is not None
            return [current_request_id(), await self._worker.request_id.remote()]

        @app.get("/own-id")
        async def own_id(response: Response) -> None:
            response.headers["x-request-id"] = "set by the application"

        @app.get("/wake")
        async def wake() -> int:
            assert self._sleeper is not None
            return int(await self._sleeper.pid.remote())

        @app.get("/raise")
        async def fail() -> None:
            raise OnPurposeError("answered by the outermost layer")

        @app.get("/headers-then-nothing")
        async def headers_then_nothing() -> Response:
            async def never() -> AsyncIterator[bytes]:
                await asyncio.Event().wait()
                yield b""

            return StreamingResponse(never())

        @app.get("/die")
        async def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        return app


def as_many_as_reported(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """An autoscaling policy: the newest number a replica reported."""
    reported = (context.raw_metrics or {}).get(REPLICAS, {})
    wanted = [series[-1].value for series in reported.values() if series]
    return max(wanted, default=context.target_num_replicas), {}


class Recorder:
    """Stands around Serve's proxy and remembers what it sent; `/sent/<name>` tells.

    A request is recorded under its header `x-record`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._sent: defaultdict[str, list[str]] = defaultdict(list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on."""
        name = dict(scope.get("headers", [])).get(b"x-record", b"").decode()
        if scope["type"] == "http" and scope["path"].startswith("/sent/"):
            await JSONResponse(self._sent[scope["path"].removeprefix("/sent/")])(scope, receive, send)
            return

        async def record(message: Message) -> None:
            self._sent[name].append(message["type"])
            await send(message)

        try:
            await self._app(scope, receive, record if name else send)
        finally:
            self._sent[name].append("end")


def proxy_middlewares() -> list[Middleware]:
    return [Middleware(Recorder)]
