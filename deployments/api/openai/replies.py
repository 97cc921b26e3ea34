"""OpenAI's image replies: whole, and as the events of its streams."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

from pydantic import BaseModel

from deployments.api.connection import prompt_size
from deployments.api.events import event
from deployments.api.openai.requests import ImageRequest
from deployments.ingress.compose import Preview
from deployments.ingress.ingress import Generated, Watched
from pipelines.plan import OutputFormat

Kind = Literal["image_generation", "image_edit"]
"""The first part of the names of a stream's events."""


class TokenDetails(BaseModel):
    """See Usage."""

    text_tokens: int = 0
    image_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's units, which some clients insist on. This server charges none: they are always zero."""

    total_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()


class OpenAIImage(BaseModel):
    """One picture: in base64 or as an address."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    """Draws this picture again."""


class OpenAIImageResponse(BaseModel):
    """OpenAI's image reply."""

    created: int
    data: list[OpenAIImage]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: str
    size: str
    usage: Usage = Usage()


def whole(asked: ImageRequest, pictures: list[Generated], links: Sequence[str | None] = ()) -> OpenAIImageResponse:
    """The reply of finished pictures, with the links to those that lie in a store."""
    first = pictures[0].plan
    return OpenAIImageResponse(
        created=int(time.time()),
        data=[_image(asked, *one) for one in zip_longest(pictures, links)],
        output_format=first.output_format,
        quality=asked.quality or "auto",
        size="{}x{}".format(*first.size),
    )


def _image(asked: ImageRequest, picture: Generated, link: str | None) -> OpenAIImage:
    if link is not None:
        return OpenAIImage(url=link, seed=picture.plan.seed)
    text = base64.b64encode(picture.image.data).decode()
    if asked.response_format == "url":
        return OpenAIImage(url=f"data:image/{picture.image.format};base64,{text}", seed=picture.plan.seed)
    return OpenAIImage(b64_json=text, seed=picture.plan.seed)


def teller(kind: Kind, asked: ImageRequest) -> Callable[[tuple[int, Watched]], bytes]:
    """What turns the items of a series into OpenAI's events; progress has none."""
    told = dict.fromkeys(range(asked.count), 0)
    quality, wanted = asked.quality or "auto", asked.partial_images or 0

    def common(data: bytes, size: str, file_format: OutputFormat) -> dict[str, object]:
        text = base64.b64encode(data).decode()
        described = {"size": size, "quality": quality, "background": "opaque", "output_format": file_format}
        return {"b64_json": text, "created_at": int(time.time())} | described

    def tell(item: tuple[int, Watched]) -> bytes:
        index, what = item
        if isinstance(what, Generated):
            plan = what.plan
            name, ours = f"{kind}.completed", {"seed": plan.seed, "prompt_tokens": prompt_size(what)}
            shown = common(what.image.data, "{}x{}".format(*plan.size), plan.output_format)
            return event(name, {"type": name, **shown, "usage": Usage().model_dump(), **ours})
        if isinstance(what, Preview) and told[index] < wanted:
            name, number = f"{kind}.partial_image", told[index]
            told[index] += 1
            shown = common(what.data, f"{what.width}x{what.height}", what.format)
            return event(name, {"type": name, **shown, "partial_image_index": number})
        return b""

    return tell
