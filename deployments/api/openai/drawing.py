"""Pictures as OpenAI's clients ask for them: whole, or as streams."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.api.admission import caller_of
from deployments.api.connection import describe, until_disconnect
from deployments.api.events import EventStream
from deployments.api.openai.replies import Kind, OpenAIImageResponse, teller, whole
from deployments.api.openai.requests import ImageRequest
from deployments.api.scope import request_id_of
from deployments.ingress.compose import Watcher
from deployments.ingress.ingress import Ingress
from pipelines.plan import GenerationParams

END = b"data: [DONE]\n\n"
"""Ends the loops of OpenAI's SDKs."""
EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {
            "enum": [
                f"{kind}.{what}"
                for kind in ("image_generation", "image_edit")
                for what in ("partial_image", "completed")
            ]
        },
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


async def generate(
    ingress: Ingress, body: ImageRequest, request: Request, response: Response
) -> OpenAIImageResponse | StreamingResponse:
    """`n` pictures of consecutive seeds."""
    return await draw(ingress, body, body.for_model(ingress.catalog), "image_generation", request, response)


async def draw(
    ingress: Ingress, asked: ImageRequest, params: GenerationParams, kind: Kind, request: Request, response: Response
) -> OpenAIImageResponse | StreamingResponse:
    """The pictures of `params`, in a reply or as events whose names begin with `kind`."""
    if not asked.stream:
        work = ingress.generate_series(params, asked.count, caller_of(request))
        pictures = await until_disconnect(request, work)
        describe(response, pictures[0])
        return whole(asked, pictures)
    watcher = Watcher(asked.partial_images or 0, params.output_format)
    items = ingress.watch_series(params, asked.count, watcher, caller_of(request))
    first = await anext(items)  # a bad request is refused here, with a status of its own
    return EventStream(first, items, teller(kind, asked), request_id_of(request.scope), END)
