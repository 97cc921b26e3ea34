"""Hyperbolic's image request and reply; its events are `progress`, `preview`, and at last `result` or `error`.

A result is the reply and `prompt_tokens`, which a plain request is told in a header: a stream's headers are long sent.
"""

from __future__ import annotations

import base64

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.api.admission import caller_of
from deployments.api.connection import describe, prompt_size, until_disconnect
from deployments.api.events import EventStream, event
from deployments.api.raw import accepted_format, bytes_reply, wants_bytes
from deployments.api.schemas import GeneratedImage, GenerationRequest, GenerationResponse
from deployments.api.scope import request_id_of
from deployments.graph import Progress
from deployments.ingress.compose import Preview, Watcher
from deployments.ingress.ingress import Generated, Ingress, Restarted, Watched

EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "preview", "result", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


async def generate(
    ingress: Ingress, body: GenerationRequest, request: Request, response: Response
) -> GenerationResponse | Response:
    """One picture, or its bytes, or the events of its making."""
    if body.stream:
        return await _stream(ingress, body, request)
    output_format = body.output_format or accepted_format(request) or "jpeg"
    work = ingress.generate(body.to_params(output_format=output_format), caller_of(request))
    generated = await until_disconnect(request, work)
    if wants_bytes(request):
        return bytes_reply(generated)
    describe(response, generated)
    return reply(generated)


async def _stream(ingress: Ingress, body: GenerationRequest, request: Request) -> StreamingResponse:
    watcher = Watcher(previews=None if body.preview else 0)
    items = ingress.watch(body.to_params(), watcher, caller_of(request))
    first = await anext(items)  # a bad request is refused here, with a status of its own
    return EventStream(first, items, tell, request_id_of(request.scope))


def reply(generated: Generated) -> GenerationResponse:
    """The reply of the contract."""
    picture = base64.b64encode(generated.image.data).decode()
    image = GeneratedImage(index=0, image=picture, random_seed=generated.plan.seed)
    return GenerationResponse(images=[image], inference_time=round(generated.seconds, 4))


def tell(item: Watched) -> bytes:
    """The event of an item."""
    match item:
        case Progress(steps=0):
            return event("progress", {"state": "queued", "stage": item.stage, "position": item.position or 0})
        case Progress():
            data = {"state": "denoising", "stage": item.stage, "step": item.step, "steps": item.steps}
            return event("progress", data | {"stage_number": item.visit, "stages": item.visits})
        case Restarted():
            return event("progress", {"state": "restarted", "stage": item.stage})
        case Preview():
            return event("preview", {"image": base64.b64encode(item.data).decode()})
        case Generated():
            return event("result", reply(item).model_dump() | {"prompt_tokens": prompt_size(item)})
