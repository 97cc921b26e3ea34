"""The POST routes that draw. A body with `model_name` is Hyperbolic's, any other on `/v1/images/*` OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.routing import APIRoute
from pydantic import Discriminator, Tag

from deployments.api import huggingface, hyperbolic, raw
from deployments.api.forms import documented, fields_of, validated
from deployments.api.openai import drawing
from deployments.api.openai.edits import edit_of, in_openais_words
from deployments.api.openai.replies import OpenAIImageResponse
from deployments.api.openai.requests import EditRequest, ImageRequest
from deployments.api.schemas import GenerationRequest, GenerationResponse
from deployments.ingress.ingress import Ingress


def _shape(body: Any) -> str:
    return "openai" if isinstance(body, dict) and body.get("model_name") is None else "hyperbolic"


AnyImageRequest = Annotated[
    Annotated[GenerationRequest, Tag("hyperbolic")] | Annotated[ImageRequest, Tag("openai")],
    Discriminator(_shape),
]


def _streamed(*schemas: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    events = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}}
    content = {"text/event-stream": events} | raw.DOCUMENTED
    return {200: {"description": "Pictures; with `stream`, events; as `Accept` asks, the bytes.", "content": content}}


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """`POST /v1/image/generation`, `/v1/images/generations` and `/v1/images/edits`."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["images"])

    @router.post("/image/generation", response_model=GenerationResponse, responses=_streamed(hyperbolic.EVENT_SCHEMA))
    async def generate(
        body: Annotated[GenerationRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | Response:
        """Draw one picture; with `stream`, tell its progress as server-sent events."""
        return await hyperbolic.generate(ingress, body, request, response)

    @router.post(
        "/images/generations",
        response_model=GenerationResponse | OpenAIImageResponse,
        responses=_streamed(hyperbolic.EVENT_SCHEMA, drawing.EVENT_SCHEMA),
    )
    async def generate_either(
        body: Annotated[AnyImageRequest, Body()], request: Request, response: Response
    ) -> GenerationResponse | Response:
        """The same with `model_name`; without, the OpenAI Images request and reply."""
        if isinstance(body, GenerationRequest):
            return await hyperbolic.generate(ingress, body, request, response)
        return await drawing.generate(ingress, body, request)

    @router.post(
        "/images/edits",
        response_model=OpenAIImageResponse,
        responses=_streamed(drawing.EVENT_SCHEMA),
        openapi_extra=dict(documented(EditRequest, ["image", "mask"], ["image", "prompt"])),
    )
    async def edit(request: Request) -> Response:
        """Change a picture, as OpenAI's clients ask for it: a form with files, or JSON."""
        body = validated(EditRequest, await fields_of(request, ingress.limits.max_body_bytes))
        params = edit_of(body, ingress.catalog, ingress.limits.max_image_pixels)
        with in_openais_words():
            return await drawing.draw(ingress, body, params, "image_edit", request)

    return router


def inference_routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """`POST /models/{name}`, as Hugging Face's clients call a model by its URL."""
    router = APIRouter(route_class=route_class, tags=["images"])

    @router.post(
        "/models/{name:path}",
        response_class=Response,
        responses={200: {"description": "The picture.", "content": raw.DOCUMENTED}},
    )
    async def infer(name: str, body: Annotated[huggingface.InferenceRequest, Body()], request: Request) -> Response:
        """Draw one picture; the reply is its bytes."""
        return await huggingface.generate(ingress, name, body, request)

    return router
