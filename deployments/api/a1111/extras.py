"""What A1111 does with finished pictures."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deployments.api.encoding import decode_base64
from pipelines.errors import InvalidValueError
from pipelines.pictures.images import check_image
from pipelines.pictures.infotext import parse_infotext


class PictureRequest(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="ignore")

    image: str | None = Field(None, description="Base64 PNG, JPEG or WebP, or a data URI.")

    def picture(self) -> bytes:
        """Its bytes; raises InvalidValueError where there are none."""
        data = decode_base64(self.image or None, "image")
        if data is None:
            raise InvalidValueError("image is missing: send it in base64", "image")
        return data


class PngInfoReply(BaseModel):
    """What a file tells."""

    info: str
    """The infotext, empty if there is none."""
    items: dict[str, Any]
    """What lies in the file."""
    parameters: dict[str, str]
    """The settings of the infotext by their names, prompts among them."""


async def png_info(body: PictureRequest, max_pixels: int) -> PngInfoReply:
    """Read a file, also one of another program's."""
    file = await asyncio.to_thread(check_image, body.picture(), "image", max_pixels)
    text = file.infotext or ""
    parsed = parse_infotext(text) if text else None
    parameters = {} if parsed is None else {"Prompt": parsed[0], "Negative prompt": parsed[1] or ""} | parsed[2]
    return PngInfoReply(info=text, items={"parameters": text} if text else {}, parameters=parameters)
