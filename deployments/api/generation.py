"""The two POST routes. A body with `model_name` is Hyperbolic's, one with `model` OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute

from deployments.api import hyperbolic, openai
from deployments.api.events import EVENT_SCHEMA
from deployments.api.schemas import (
    AnyImageRequest,
    GenerationRequest,
    GenerationResponse,
    OpenAIImageResponse,
)
from deployments.ingress.ingress import Ingress

_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture; with `stream`, server-sent events.",
        "content": {"text/event-stream": {"schema": EVENT_SCHEMA}},
    }
}


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """`POST /v1/image/generation` and `/v1/images/generations`."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["images"])

    @router.post("/image/generation", response_model=GenerationResponse, responses=_STREAMED)
    async def generate(
        body: Annotated[GenerationRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | StreamingResponse:
        """Draw one picture; with `stream`, tell its progress as server-sent events."""
        return await hyperbolic.generate(ingress, body, request, response)

    @router.post("/images/generations", response_model=GenerationResponse | OpenAIImageResponse, responses=_STREAMED)
    async def generate_either(
        body: Annotated[AnyImageRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | OpenAIImageResponse | StreamingResponse:
        """The same with `model_name`; with `model`, the OpenAI Images request and reply."""
        if isinstance(body, GenerationRequest):
            return await hyperbolic.generate(ingress, body, request, response)
        return await openai.generate(ingress, body, request, response)

    return router
