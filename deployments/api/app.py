"""HTTP: the routes of the contract."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from deployments.api.errors import failure_of, reply, validation_failure
from deployments.api.events import events
from deployments.api.schemas import (
    AnyImageRequest,
    ErrorResponse,
    GenerationRequest,
    GenerationResponse,
    OpenAIImage,
    OpenAIImageRequest,
    OpenAIImageResponse,
    Wish,
)
from deployments.proxy.answers import KEY, AccessLog, BodyLimit, request_id_of
from deployments.telemetry.stages import Progress, server_timing
from pipelines.sampling.samplers import SAMPLER_CHOICES, SAMPLERS

if TYPE_CHECKING:
    from config.catalog import ModelSpec
    from deployments.ingress.ingress import Generated, Ingress
    from pipelines.plan import CompiledSize

logger = logging.getLogger("sdgraph.http")

# For the documentation alone: `_admitting` does the work.
_DOCUMENTED_KEY = Depends(HTTPBearer(auto_error=False, description="An API key, where the server asks for one."))


_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "preview", "result", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture; with `stream`, server-sent events.",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}


def create_http_app(ingress: Ingress) -> FastAPI:
    """The FastAPI application of an ingress."""
    app = FastAPI(
        title="sdgraph",
        version="0.1.0",
        description="Stable Diffusion as a Ray Serve graph; speaks Hyperbolic's image API.",
        telemetry={"tracing": False, "metrics": False},  # its spans would begin a trace of their own inside Serve's
    )
    app.add_middleware(BodyLimit, max_bytes=ingress.limits.max_body_bytes)
    app.add_middleware(AccessLog)

    async def fail(request: Request, error: Exception) -> Response:
        return answer_to(error, request)

    for handled in (HTTPException, Exception):
        app.add_exception_handler(handled, fail)

    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 413, 422, 429, 500, 503, 504)
    }
    app.include_router(_generation_routes(ingress), responses=documented, dependencies=[_DOCUMENTED_KEY])
    app.include_router(_listing_routes(ingress), dependencies=[_DOCUMENTED_KEY])
    app.include_router(_health_routes(ingress))
    return app


def answer_to(error: Exception, request: Request) -> Response:
    """The contract's answer to whatever went wrong."""
    if isinstance(error, RequestValidationError):
        return reply(validation_failure(error))
    return reply(failure_of(error, request_id_of(request.scope)))


def _admitting(ingress: Ingress) -> type[APIRoute]:
    """A route that checks key and rate before it parses the body, which FastAPI's dependencies come after.

    Bodies are JSON whatever they are called: `curl -d` says it sends a form.
    """

    class AdmittingRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def admit(request: Request) -> Response:
                try:
                    return await serve(request)
                # Starlette answers the unforeseen too, but then raises it again, and Serve logs a crash.
                except Exception as error:
                    return answer_to(error, request)

            async def serve(request: Request) -> Response:
                key = ingress.keys.identify(request.scope)
                request.scope[KEY] = key
                if key is not None and request.method == "POST":
                    await ingress.allowance.request(key)
                kept = [(name, value) for name, value in request.scope["headers"] if name.lower() != b"content-type"]
                headers = [*kept, (b"content-type", b"application/json")]
                return await handle(Request({**request.scope, "headers": headers}, request.receive))

            return admit

    return AdmittingRoute


def _generation_routes(ingress: Ingress) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=_admitting(ingress), tags=["images"])

    async def hyperbolic(
        body: GenerationRequest, request: Request, response: Response
    ) -> GenerationResponse | StreamingResponse:
        wish = _wish(request)
        if body.stream:
            items = ingress.watch(body.to_params(), bool(body.preview), wish)
            first = await anext(items)  # a bad request is refused here, with a status of its own
            assert isinstance(first, Progress)
            stream = events(first, items, request_id_of(request.scope))
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})
        made = await _until_disconnect(request, ingress.generate(body.to_params(), wish))
        _describe(response, made)
        return cast(GenerationResponse, made.response())

    @router.post("/image/generation", response_model=GenerationResponse, responses=_STREAMED)
    async def generate(
        body: Annotated[GenerationRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | StreamingResponse:
        """Draw one picture; with `stream`, tell its progress as server-sent events."""
        return await hyperbolic(body, request, response)

    @router.post("/images/generations", response_model=GenerationResponse | OpenAIImageResponse, responses=_STREAMED)
    async def generate_either(
        body: Annotated[AnyImageRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | OpenAIImageResponse | StreamingResponse:
        """The same with `model_name`; with `model`, the OpenAI Images request and reply."""
        if isinstance(body, GenerationRequest):
            return await hyperbolic(body, request, response)
        assert isinstance(body, OpenAIImageRequest)
        made = await _until_disconnect(request, ingress.generate_series(body.to_params(), body.n or 1, _wish(request)))
        _describe(response, made[0])
        data = [OpenAIImage(b64_json=base64.b64encode(m.image.data).decode()) for m in made]
        return OpenAIImageResponse(created=int(time.time()), data=data)

    return router


def _wish(request: Request) -> Wish:
    """Who asks, and the seconds they allow in the header that Serve's proxy reads too, unless it is nonsense."""
    try:
        seconds = float(request.headers.get("x-request-timeout-seconds", "inf"))
    except ValueError:
        seconds = math.inf
    return Wish(request.scope.get(KEY), seconds if seconds > 0 else math.inf)


async def _until_disconnect(request: Request, work: Any) -> Any:
    """Await `work`, cancelling it when the client hangs up: its rows serve somebody else from the next tick on."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            logger.info("client left")
            task.cancel()
        return await task
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _describe(response: Response, made: Generated) -> None:
    response.headers["server-timing"] = server_timing(made.spans)
    response.headers["x-backend"] = made.plan.stages[0].backend


def _listing(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": entries}


def _listing_routes(ingress: Ingress) -> APIRouter:
    """What this server offers, read from the tables that validate requests."""
    router = APIRouter(prefix="/v1", route_class=_admitting(ingress), tags=["offers"])
    catalog = ingress.catalog
    loras = [entry for entry in catalog.loras if entry.unavailable is None]

    def describe(model: ModelSpec, compiled: list[CompiledSize]) -> dict[str, Any]:
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
            "tvm_compiled": [
                {"size": str(entry), "speedup": round(entry.speedup, 2)}
                for entry in compiled
                if entry.component == model.unet and entry.control == model.requires_controlnet
            ],
            "refiner": model.refiner is not None,
            "controlnets": list(catalog.controls_of(model.name)),
            "loras": [entry.name for entry in loras if model.unet in entry.bases],
        }

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """Models that can be asked for now."""
        compiled = await ingress.compiled.known()
        return _listing([describe(model, compiled) for model in catalog.available_models()])

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
        return _listing(
            [
                {"name": e.name, "available": e in loras, "reason": e.unavailable, "trigger": e.trigger}
                for e in catalog.loras
            ]
        )

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
