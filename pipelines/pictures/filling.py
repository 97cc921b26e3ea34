"""A masked part painted with the colours around it, before it is drawn over: A1111's "fill"."""

from __future__ import annotations

from PIL import Image, ImageFilter, ImageOps

_LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Blurs, the widest first, in pixels, and how often each is laid over the ones before: those of A1111's `masking.fill`.

A narrow blur reaches a little way into the hole and hides the wide ones there."""


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture whose masked part is made of its surroundings; what is black in the mask stays.

    Args:
        picture: RGB.
        mask: of its size, 8 bit grey; white is filled.
    """
    holed = Image.new("RGBa", picture.size)  # premultiplied: what is not there adds no colour to a blur
    holed.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    result = Image.new("RGBA", picture.size)
    for radius, times in _LAYERS:
        layer = holed.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(layer)
    return result.convert("RGB")
