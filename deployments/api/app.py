"""The FastAPI application of an ingress, and the ingress replica that carries it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBasic, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from deployments import __version__
from deployments.api import generation, info, offers, page, upscaling
from deployments.api.a1111 import routes as a1111
from deployments.api.a1111.errors import WebuiError
from deployments.api.access_log import AccessLog
from deployments.api.admission import Admission
from deployments.api.body_limit import BodyLimit
from deployments.api.browsers import cors
from deployments.api.errors import answer
from deployments.api.schemas import ErrorResponse
from deployments.api.scope import request_id_of
from deployments.ingress.ingress import Ingress

ERROR_STATUSES = (400, 401, 413, 422, 429, 500, 503, 504)


class _Password(HTTPBasic):
    """Says in the document that Basic works; FastAPI's own refuses what clients without a password send."""

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        return None


# For the documentation alone: the admission reads the header.
_DOCUMENTED_KEY = [
    Depends(HTTPBearer(auto_error=False, description="An API key, where the server asks for one.")),
    Depends(_Password(scheme_name="HTTPBasic", auto_error=False, description="The same, as the password of any user.")),
]


class HttpIngress(Ingress):
    """The ingress deployment: an Ingress that is spoken to by HTTP."""

    def __serve_build_asgi_app__(self) -> Any:
        return create_http_app(self)


def create_http_app(ingress: Ingress) -> FastAPI:
    """The application of an ingress: its routes, its error handlers, a body limit and an access log."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await ingress.caller_state.close()
        await ingress.usage.close()

    app = FastAPI(
        lifespan=lifespan,
        title="sdgraph",
        version=__version__,
        description="Stable Diffusion as a Ray Serve graph; speaks Hyperbolic's image API.",
        telemetry={"tracing": False, "metrics": False},  # its spans would begin a trace of their own inside Serve's
    )
    app.add_middleware(BodyLimit, max_bytes=ingress.limits.max_body_bytes)
    app.add_middleware(AccessLog)

    if ingress.limits.cors_origins:
        app.add_middleware(CORSMiddleware, **cors(ingress.limits.cors_origins))

    async def fail(request: Request, error: Exception) -> Response:
        if request.method == "OPTIONS" and isinstance(error, HTTPException) and error.status_code == 405:
            return Response(status_code=204, headers=error.headers)  # some clients ask so whether a server is there
        return answer(error, request_id_of(request.scope))

    for handled in (HTTPException, Exception):
        app.add_exception_handler(handled, fail)

    admission = Admission(ingress.keys, ingress.usage)
    route_class = admission.route_class()
    documented: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ERROR_STATUSES}
    app.include_router(generation.routes(ingress, route_class), responses=documented, dependencies=_DOCUMENTED_KEY)
    drawing = generation.inference_routes(ingress, route_class)
    # 404: a name with a line break in it is on no route.
    app.include_router(drawing, responses=documented | {404: {"model": ErrorResponse}}, dependencies=_DOCUMENTED_KEY)
    app.include_router(info.routes(ingress, route_class), responses=documented, dependencies=_DOCUMENTED_KEY)
    app.include_router(upscaling.routes(ingress, route_class), responses=documented, dependencies=_DOCUMENTED_KEY)
    app.include_router(offers.routes(ingress, route_class), dependencies=_DOCUMENTED_KEY)
    theirs: dict[int | str, dict[str, Any]] = {status: {"model": WebuiError} for status in ERROR_STATUSES}
    for router in a1111.routers(ingress, admission):
        app.include_router(router, responses=theirs, dependencies=_DOCUMENTED_KEY)
    app.include_router(offers.health_routes(ingress))
    app.include_router(page.routes())
    return app
