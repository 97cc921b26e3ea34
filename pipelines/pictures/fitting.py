"""Pictures of one shape made to fit another, as A1111's resize modes do; those of the same shape stay as they are."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image, ImageOps

from pipelines.pictures.images import read_whole_image

Fit = Literal["stretch", "crop", "fill"]
"""All of it out of proportion; its middle; all of it in proportion, its edges drawn out over what is left."""


def fitted(data: bytes, param: str, width: int, height: int, how: Fit) -> bytes:
    """A picture's file of the shape of `width` x `height`; a PNG if it had another one.

    Raises:
        InvalidValueError: it cannot be decoded.
    """
    if how == "stretch":
        return data
    image = read_whole_image(data, param)
    if image.width * height == image.height * width:
        return data
    if how == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    else:
        image = _drawn_out(ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS), width, height)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _drawn_out(image: Image.Image, width: int, height: int) -> Image.Image:
    """In the middle of a larger picture, its outermost rows and columns stretched over the rest."""
    left, top = (width - image.width) // 2, (height - image.height) // 2
    right, bottom = left + image.width, top + image.height
    result = Image.new("RGB", (width, height))
    edges = {
        (0, 0, width, top): (0, 0, image.width, 1),
        (0, bottom, width, height): (0, image.height - 1, image.width, image.height),
        (0, 0, left, height): (0, 0, 1, image.height),
        (right, 0, width, height): (image.width - 1, 0, image.width, image.height),
    }
    for (x, y, end, low), box in edges.items():
        if end > x and low > y:
            result.paste(image.resize((end - x, low - y), box=box), (x, y))
    result.paste(image, (left, top))
    return result
