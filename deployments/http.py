"""HTTP: routes, the error body, request ids, and a limit on what is read."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from deployments.failures import Failure, failure_of, validation_failure
from deployments.observability import server_timing
from deployments.schemas import (
    AnyImageRequest,
    ErrorDetail,
    ErrorResponse,
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    OpenAIImage,
    OpenAIImageRequest,
    OpenAIImageResponse,
)
from pipelines.errors import TooLargeError
from pipelines.samplers import SAMPLER_CHOICES, SAMPLERS

if TYPE_CHECKING:
    from config.catalog import ModelSpec
    from deployments.ingress import Generated, Ingress

logger = logging.getLogger("sdgraph.http")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_BEARER = Annotated[
    object, Depends(HTTPBearer(auto_error=False, description="An API key, where the server asks for one."))
]


@dataclass(frozen=True)
class HttpLimits:
    """What is read of a request."""

    max_body_bytes: int


class Gate:
    """Outermost ASGI layer: knows a request by its id, reads its body up to the limit, writes one log line.

    Ray Serve has no body limit and a chunked body announces no length, so bytes are counted as they come, and reading
    stops at the limit. The id is Serve's: its proxy takes `x-request-id` from the client or makes one, hands it on, and
    sends it back.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begin, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        body = await self._read(receive)
        if body is None:
            error = TooLargeError(f"the body is larger than {self._max_body_bytes} bytes")
            await _reply(failure_of(error, request_id))(scope, receive, noted)
        else:
            await self._app(scope, _replay(body, receive), noted)
        taken = (time.perf_counter() - begin) * 1000
        logger.info("%s %s %d %.0f ms id=%s", scope["method"], scope["path"], status, taken, request_id)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, None once it is over the limit."""
        chunks, size = [], 0
        while True:
            message = await receive()
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once and then whatever comes next (a disconnect)."""
    handed = False

    async def replayed() -> Message:
        nonlocal handed
        if handed:
            return await receive()
        handed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _reply(failure: Failure) -> JSONResponse:
    said = {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}
    body = ErrorResponse(**said, error=ErrorDetail(**said), detail=failure.detail)
    content = body.model_dump(exclude={"detail"} if failure.detail is None else None)
    return JSONResponse(content, failure.status, headers=failure.headers)


def create_http_app(ingress: Ingress) -> FastAPI:
    """The FastAPI application of an ingress."""
    app = FastAPI(
        title="sdgraph",
        version="0.1.0",
        strict_content_type=False,  # curl -d says it sends a form
        description="Stable Diffusion as a Ray Serve graph; speaks Hyperbolic's image API.",
    )
    app.add_middleware(Gate, max_body_bytes=ingress.limits.http.max_body_bytes)

    async def fail(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return _reply(validation_failure(error))
        return _reply(failure_of(error, request.state.request_id))

    for handled in (RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(handled, fail)

    async def admit(request: Request, _documented: _BEARER) -> None:
        caller = ingress.keys.identify(request.headers.get("authorization"))
        if request.method == "POST":
            ingress.rate.hit(caller or (request.client.host if request.client else "unknown"))

    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 413, 422, 429, 500, 503, 504)
    }
    app.include_router(_generation_routes(ingress, admit, documented))
    app.include_router(_listing_routes(ingress), dependencies=[Depends(admit)])
    app.include_router(_health_routes(ingress))
    return app


def _generation_routes(
    ingress: Ingress, admit: Callable[..., Awaitable[None]], documented: dict[int | str, dict[str, Any]]
) -> APIRouter:
    # Keys are checked before the body is parsed: the dependency hangs on the router.
    router = APIRouter(prefix="/v1", dependencies=[Depends(admit)], responses=documented, tags=["images"])

    async def hyperbolic(body: GenerationRequest, request: Request, response: Response) -> GenerationResponse:
        made = await _until_disconnect(request, ingress.generate(body.to_params()))
        _describe(response, made)
        image = GeneratedImage(index=0, image=_base64(made), random_seed=made.plan.seed)
        return GenerationResponse(images=[image], inference_time=round(made.seconds, 4))

    @router.post("/image/generation")
    async def generate(
        body: Annotated[GenerationRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse:
        """Draw one picture."""
        return await hyperbolic(body, request, response)

    @router.post("/images/generations")
    async def generate_either(
        body: Annotated[AnyImageRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | OpenAIImageResponse:
        """The same with `model_name`; with `model`, the OpenAI Images request and reply."""
        if isinstance(body, GenerationRequest):
            return await hyperbolic(body, request, response)
        assert isinstance(body, OpenAIImageRequest)
        made = await _until_disconnect(request, ingress.generate_series(body.to_params(), body.n or 1))
        _describe(response, made[0])
        return OpenAIImageResponse(created=int(time.time()), data=[OpenAIImage(b64_json=_base64(m)) for m in made])

    return router


async def _until_disconnect(request: Request, work: Any) -> Any:
    """Await `work`, cancelling it when the client hangs up: its rows serve somebody else from the next tick on."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            logger.info("client left, id=%s", request.state.request_id)
            task.cancel()
        return await task
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _base64(made: Generated) -> str:
    return base64.b64encode(made.image.data).decode()


def _describe(response: Response, made: Generated) -> None:
    response.headers["server-timing"] = server_timing(made.spans)
    response.headers["x-backend"] = made.plan.stages[0].backend


def _listing(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": entries}


def _listing_routes(ingress: Ingress) -> APIRouter:
    """What this server offers, read from the tables that validate requests."""
    router = APIRouter(prefix="/v1", tags=["offers"])
    catalog = ingress.catalog
    loras = [entry for entry in catalog.loras if entry.unavailable is None]

    def describe(model: ModelSpec) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "sdgraph",
            "family": model.family,
            "defaults": model.defaults.model_dump(),
            "size_multiple": model.size_multiple,
            "sizes": [str(size) for size in model.sizes],
            "tvm_sizes": [str(size) for size in model.tvm_sizes],
            "refiner": model.refiner is not None,
            "controlnets": list(model.controlnets),
            "loras": [entry.name for entry in loras if model.unet in entry.bases],
        }

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """Models that can be asked for now."""
        return _listing([describe(model) for model in catalog.available_models()])

    @router.get("/samplers")
    async def samplers() -> dict[str, Any]:
        """Sampler names, with the diffusers scheduler each stands for."""
        return _listing(
            [
                {"name": n, "scheduler": s.scheduler, "max_steps": s.max_steps, "edm_models_only": s.edm}
                for n, s in ((name, SAMPLERS[name]) for name in SAMPLER_CHOICES)
            ]
        )

    @router.get("/styles")
    async def styles() -> dict[str, Any]:
        """Style presets with their templates."""
        return _listing([style.model_dump() for style in catalog.styles])

    @router.get("/loras")
    async def lora_names() -> dict[str, Any]:
        """LoRAs: which are served, and why the others are not."""
        return _listing([{"name": e.name, "available": e in loras, "reason": e.unavailable} for e in catalog.loras])

    @router.get("/controlnets")
    async def controlnets() -> dict[str, Any]:
        """ControlNets of the models that are served."""
        served = {model.name for model in catalog.available_models()}
        return _listing(
            [{"name": c.name, "models": m} for c in catalog.controlnets if (m := sorted(served & set(c.models)))]
        )

    return router


def _health_routes(ingress: Ingress) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz(response: Response) -> dict[str, Any]:
        """200 when every deployment can serve, else 503; the state of each, and why."""
        ready, states = await ingress.readiness()
        response.status_code = 200 if ready else 503
        return {"status": "ready" if ready else "waiting", "deployments": dict(states)}

    return router
