"""Pictures as the body of a reply, for clients whose `Accept` asks for one."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from deployments.api.connection import describe
from deployments.ingress.ingress import Generated
from pipelines.plan import OutputFormat

MEDIA_TYPES: dict[str, OutputFormat | None] = {
    "image/*": None,
    "image/jpeg": "jpeg",
    "image/jpg": "jpeg",
    "image/png": "png",
    "image/webp": "webp",
}
"""What a client may accept, and the format that it means; None leaves that to the request."""
DOCUMENTED: dict[str, Any] = {
    f"image/{kind}": {"schema": {"type": "string", "contentMediaType": f"image/{kind}"}}
    for kind in ("jpeg", "png", "webp")
}
SEED_HEADER = "x-seed"
HUB_CLIENT = "hf_hub/"
"""In the user agent of huggingface_hub, with its version."""


def wants_bytes(request: Request) -> bool:
    """Whether the client prefers the bytes of a picture.

    huggingface_hub sends `Accept: image/png` with everything that draws, whatever its provider reads; those that come
    to routes which can answer with JSON read JSON. The route that it reads bytes of does not ask here.
    """
    return _best(request) in MEDIA_TYPES and HUB_CLIENT not in request.headers.get("user-agent", "")


def accepted_format(request: Request) -> OutputFormat | None:
    """The format that `Accept` names, None if it names none or prefers something else."""
    return MEDIA_TYPES.get(_best(request) or "")


def bytes_reply(generated: Generated) -> Response:
    """The picture itself; its seed is in a header."""
    response = Response(generated.image.data, media_type=f"image/{generated.image.format}")
    describe(response, generated)
    response.headers[SEED_HEADER] = str(generated.plan.seed)
    return response


def _best(request: Request) -> str | None:
    """The first of the media types of the highest quality (RFC 9110, 12.5.1) that this server has."""
    offers = []
    for part in ",".join(request.headers.getlist("accept")).split(","):
        media, *parameters = (text.strip().lower() for text in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        if media in MEDIA_TYPES or media in ("application/json", "application/*", "*/*", "text/event-stream"):
            offers.append((_number(quality), media))
    return max(offers, key=lambda offer: offer[0], default=(0.0, None))[1]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
