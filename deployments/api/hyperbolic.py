"""Hyperbolic's image request and reply."""

from __future__ import annotations

import base64

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.api.admission import caller_of
from deployments.api.connection import describe, until_disconnect
from deployments.api.events import EventStream
from deployments.api.schemas import GeneratedImage, GenerationRequest, GenerationResponse
from deployments.api.scope import request_id_of
from deployments.ingress.ingress import Generated, Ingress


async def generate(
    ingress: Ingress, body: GenerationRequest, request: Request, response: Response
) -> GenerationResponse | StreamingResponse:
    """One picture, or the events of its making."""
    if body.stream:
        return await _stream(ingress, body, request)
    generated = await until_disconnect(request, ingress.generate(body.to_params(), caller_of(request)))
    describe(response, generated)
    return reply(generated)


async def _stream(ingress: Ingress, body: GenerationRequest, request: Request) -> StreamingResponse:
    items = ingress.watch(body.to_params(), bool(body.preview), caller_of(request))
    first = await anext(items)  # a bad request is refused here, with a status of its own
    return EventStream(first, items, reply, request_id_of(request.scope))


def reply(generated: Generated) -> GenerationResponse:
    """The reply of the contract."""
    picture = base64.b64encode(generated.image.data).decode()
    image = GeneratedImage(index=0, image=picture, random_seed=generated.plan.seed)
    return GenerationResponse(images=[image], inference_time=round(generated.seconds, 4))
