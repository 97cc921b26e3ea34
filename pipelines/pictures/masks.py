"""Repainting a part of a picture: which part is drawn, and how what was drawn goes back into the picture.

diffusers' `VaeImageProcessor` crops, fills and lays over, so that a part is cut out as its inpainting pipelines do.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageFilter, ImageOps

from pipelines.errors import InvalidValueError
from pipelines.pictures.filling import filled
from pipelines.pictures.images import read_alpha, read_image, read_whole_image
from pipelines.plan import GenerationPlan, InpaintPlan

if TYPE_CHECKING:
    from pipelines.sampling.latents import LatentSpace

REPAINTED = 128
"""Grey values from here on are repainted, as in diffusers."""


@dataclass(frozen=True)
class Canvas:
    """A picture, the part of it that is drawn, and where in it that is repainted."""

    whole: Image.Image
    """The picture that the drawn part is pasted into, RGB."""
    mask: Image.Image
    """Of the same size, 8 bit grey: white is repainted, black stays, grey is in between."""
    box: tuple[int, int, int, int] | None
    """Left, top, right and bottom of the part that is drawn, in pixels of `whole`; None is all of it."""
    part: Image.Image
    """The part that is drawn over, RGB, of the plan's size."""
    part_mask: Image.Image
    """Of the same size, 8 bit grey."""

    @classmethod
    def create(cls, image: bytes, mask: bytes, plan: InpaintPlan, width: int, height: int) -> Canvas:
        """Read picture and mask for a plan of `width` x `height` pixels.

        Raises:
            InvalidValueError: one cannot be decoded, or `check_mask` refuses the mask.
        """
        from diffusers.image_processor import VaeImageProcessor  # where pictures are drawn; the ingress only checks

        grey = check_mask(image, mask)
        if plan.blur:
            grey = grey.filter(ImageFilter.GaussianBlur(plan.blur))
        if plan.area == "whole":
            picture = read_image(image, "image", width, height)
            grey = grey.resize(picture.size, Image.Resampling.LANCZOS) if grey.size != picture.size else grey
            part = filled(picture, grey) if plan.fill == "surroundings" else picture
            return cls(picture, grey, None, part, grey)
        picture, processor = read_whole_image(image, "image"), VaeImageProcessor()
        box = processor.get_crop_region(grey, width, height, pad=plan.padding)
        part, part_mask = (
            processor.resize(source.crop(box), height, width, resize_mode="fill") for source in (picture, grey)
        )
        part_mask = part_mask.convert("L")
        part = filled(part, part_mask) if plan.fill == "surroundings" else part
        return cls(picture, grey, box, part, part_mask)

    @classmethod
    def blank(cls, picture: Image.Image) -> Canvas:
        """A picture that is repainted all over, without a mask of its own."""
        white = Image.new("L", picture.size, 255)
        return cls(picture, white, None, picture, white)

    def cut(self, other: Image.Image) -> Image.Image:
        """What lies where the drawn part does in another picture of the size of `whole`, in the drawn part's size."""
        if self.box is None:
            return other
        from diffusers.image_processor import VaeImageProcessor

        cut: Image.Image = VaeImageProcessor().resize(
            other.crop(self.box), self.part.height, self.part.width, resize_mode="fill"
        )
        return cut

    def lay_in(self, drawn: Image.Image) -> Image.Image:
        """The picture with the drawn part pasted in; unchanged, bit for bit, wherever the mask is black."""
        from diffusers.image_processor import VaeImageProcessor

        laid: Image.Image = VaeImageProcessor().apply_overlay(self.mask, self.whole, drawn, self.box)
        return laid

    def latent_mask(self, space: LatentSpace) -> list[list[bool]]:
        """Which latents are drawn, `[height][width]`: each asks its upper left pixel, as diffusers does."""
        width, step = self.part_mask.width, space.downscale
        grey = self.part_mask.tobytes()
        rows = (grey[begin : begin + width : step] for begin in range(0, len(grey), width * step))
        return [[value >= REPAINTED for value in row] for row in rows]


def canvas_of(plan: GenerationPlan, image: bytes | None, mask: bytes | None) -> Canvas | None:
    """The canvas of a request with a mask, None for any other; raises as `Canvas.create`."""
    inpaint = plan.stages[0].inpaint
    if inpaint is None or image is None or mask is None:
        return None
    return Canvas.create(image, mask, inpaint, plan.width, plan.height)


def read_start(plan: GenerationPlan, image: bytes | None, mask: bytes | None) -> tuple[Image.Image, Canvas | None]:
    """What the VAE encodes before the first stage: a picture, RGB of the plan's size, and which part of it is drawn.

    Without a mask a UNet for inpainting repaints all of it; without a picture either, of a grey one.
    """
    if canvas := canvas_of(plan, image, mask):
        return canvas.part, canvas
    size = (plan.width, plan.height)
    picture = Image.new("RGB", size) if image is None else read_image(image, "image", *size)
    return picture, Canvas.blank(picture) if plan.stages[0].reads_mask else None


def mask_of_holes(data: bytes, param: str) -> bytes:
    """A mask as OpenAI's clients send it, where transparent is repainted, as a PNG where white is.

    One without transparency stays as it is.

    Raises:
        InvalidValueError: it cannot be decoded.
    """
    alpha = read_alpha(data, param)
    if alpha is None:
        return data
    buffer = io.BytesIO()
    ImageOps.invert(alpha).save(buffer, "PNG")
    return buffer.getvalue()


def mask_of_strokes(data: bytes, param: str, inverted: bool = False) -> bytes:
    """A mask as A1111's clients send it, as a PNG where white is repainted.

    One with transparent parts is repainted where it is more than half opaque, whatever its colours; any other is read
    by them.

    Args:
        data: the file.
        param: what it is called in errors.
        inverted: black is repainted, and white stays.

    Raises:
        InvalidValueError: it cannot be decoded.
    """
    alpha = read_alpha(data, param)
    if alpha is not None and alpha.getextrema() != (255, 255):
        grey = alpha.point([255 if value > REPAINTED else 0 for value in range(256)])
    elif inverted:
        grey = read_whole_image(data, param).convert("L")
    else:
        return data
    buffer = io.BytesIO()
    (ImageOps.invert(grey) if inverted else grey).save(buffer, "PNG")
    return buffer.getvalue()


def check_mask(image: bytes, mask: bytes) -> Image.Image:
    """The mask in grey, white where it is transparent.

    Raises:
        InvalidValueError: it cannot be decoded, has another size than the picture, or repaints nothing.
    """
    grey = read_whole_image(mask, "mask_image").convert("L")
    size = read_whole_image(image, "image").size
    if grey.size != size:
        raise InvalidValueError(
            f"mask_image is {grey.width}x{grey.height}, image {size[0]}x{size[1]}: send a mask of the picture's size",
            "mask_image",
        )
    if max(grey.tobytes()) < REPAINTED:
        raise InvalidValueError(
            "mask_image is black all over, so nothing would be repainted: make it white where the picture is to change",
            "mask_image",
        )
    return grey
