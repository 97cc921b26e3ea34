"""The OpenAI Images request and reply, so that its clients reach the same models."""

from __future__ import annotations

import base64
import time

from fastapi import Request, Response

from deployments.api.admission import caller_of
from deployments.api.connection import describe, until_disconnect
from deployments.api.schemas import OpenAIImage, OpenAIImageRequest, OpenAIImageResponse
from deployments.ingress.ingress import Ingress


async def generate(
    ingress: Ingress, body: OpenAIImageRequest, request: Request, response: Response
) -> OpenAIImageResponse:
    """`n` pictures of consecutive seeds, inline."""
    work = ingress.generate_series(body.to_params(), body.n or 1, caller_of(request))
    generated = await until_disconnect(request, work)
    describe(response, generated[0])
    data = [OpenAIImage(b64_json=base64.b64encode(picture.image.data).decode()) for picture in generated]
    return OpenAIImageResponse(created=int(time.time()), data=data)
