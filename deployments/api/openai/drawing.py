"""Pictures for OpenAI's dialect, as one reply or as a stream."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request, Response

from deployments.api.admission import caller_of
from deployments.api.connection import describe, until_disconnect
from deployments.api.events import EventStream
from deployments.api.openai.replies import Kind, teller, whole
from deployments.api.openai.requests import ImageRequest
from deployments.api.raw import accepted_format, bytes_reply, wants_bytes
from deployments.api.scope import request_id_of
from deployments.ingress.compose import Watcher
from deployments.ingress.ingress import Ingress
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams

END = b"data: [DONE]\n\n"
"""Ends the loops of OpenAI's SDKs."""
EVENT_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "event": {
                    "enum": [
                        *(
                            f"{kind}.{what}"
                            for kind in ("image_generation", "image_edit")
                            for what in ("partial_image", "completed")
                        ),
                        "error",
                    ]
                },
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
        },
        {"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}},
    ]
}


async def generate(ingress: Ingress, body: ImageRequest, request: Request) -> Response:
    """`n` pictures of consecutive seeds."""
    return await draw(ingress, body, body.for_model(ingress.catalog), "image_generation", request)


async def draw(
    ingress: Ingress, asked: ImageRequest, params: GenerationParams, kind: Kind, request: Request
) -> Response:
    """The pictures of `params`, in a reply or as events whose names begin with `kind`; of one alone, its bytes."""
    raw = wants_bytes(request) and not asked.stream
    if raw and asked.count > 1:
        raise InvalidValueError(f"n {asked.count} is not possible where Accept asks for a picture's bytes; send 1", "n")
    if asked.output_format is None and raw:
        params = replace(params, output_format=accepted_format(request) or params.output_format)
    if not asked.stream:
        work = ingress.generate_series(params, asked.count, caller_of(request))
        pictures = await until_disconnect(request, work)
        if raw:
            return bytes_reply(pictures[0])
        # Written here: FastAPI would read megabytes of base64 once more to be sure of their type.
        links: list[str | None] = []
        if asked.response_format == "url" and ingress.links is not None:
            links = await ingress.links.of([picture.image for picture in pictures])
        reply = Response(
            whole(asked, pictures, links).model_dump_json(exclude_none=True), media_type="application/json"
        )
        describe(reply, pictures[0])
        return reply
    watcher = Watcher(asked.partial_images or 0, params.output_format)
    items = ingress.watch_series(params, asked.count, watcher, caller_of(request))
    first = await anext(items)  # a bad request is refused here, with a status of its own
    return EventStream(first, items, teller(kind, asked), request_id_of(request.scope), END)
