"""A1111's routes for finished pictures: enlarging, and reading their infotext."""

from __future__ import annotations

import asyncio
import base64
import html
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from deployments.api.a1111.options import Options
from deployments.api.admission import caller_of
from deployments.api.connection import until_disconnect
from deployments.api.encoding import decode_base64
from deployments.api.nulls import NullsAbsent
from deployments.ingress.ingress import Ingress
from deployments.ingress.upscaling import Upscaled
from pipelines.enlargement import MAX_SCALE, MIN_SCALE
from pipelines.errors import InvalidValueError
from pipelines.pictures.images import PictureFile, check_image, picture_size
from pipelines.pictures.infotext import parse_infotext
from pipelines.upscale import UpscaleParams

MOST_PICTURES = 16
"""Most pictures of one request."""


class PictureRequest(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="ignore")

    image: str | None = Field(None, description="Base64 PNG, JPEG or WebP, or a data URI.")


class EnlargeRequest(NullsAbsent):
    """How pictures are enlarged. `null` is absent."""

    model_config = ConfigDict(extra="ignore")

    resize_mode: Literal[0, 1] = Field(
        0, description="0: scale by upscaling_resize. 1: scale to upscaling_resize_w x upscaling_resize_h."
    )
    upscaling_resize: FiniteFloat = Field(2.0, ge=MIN_SCALE, le=MAX_SCALE)
    upscaling_resize_w: int = Field(512, ge=1)
    upscaling_resize_h: int = Field(512, ge=1)
    upscaling_crop: bool = Field(
        True, description="False: the picture covers a size of another shape, and nothing is cut off."
    )
    upscaler_1: str = Field("None", max_length=200, description="See /sdapi/v1/upscalers; None keeps the size.")
    upscaler_2: str = Field("None", max_length=200)
    extras_upscaler_2_visibility: FiniteFloat = Field(0, description="Only 0: a second upscaler is not possible here.")
    gfpgan_visibility: FiniteFloat = Field(0, description="0: there is no face restorer.")
    codeformer_visibility: FiniteFloat = Field(0, description="0: there is no face restorer.")


class EnlargeOneRequest(EnlargeRequest):
    """`POST /sdapi/v1/extra-single-image`."""

    image: str | None = Field(None, description="Base64 PNG, JPEG or WebP, or a data URI.")


class NamedPicture(BaseModel):
    """One of several pictures."""

    data: str
    name: str | None = None


class EnlargeManyRequest(EnlargeRequest):
    """`POST /sdapi/v1/extra-batch-images`."""

    imageList: list[NamedPicture] = Field([], max_length=MOST_PICTURES)  # noqa: N815 - the wire's spelling


class EnlargedReply(BaseModel):
    """A larger picture."""

    html_info: str
    """How the picture was made."""
    image: str
    """Base64, in the format of option `samples_format`."""


class EnlargedManyReply(BaseModel):
    """Larger pictures."""

    html_info: str
    images: list[str]


class PngInfoReply(BaseModel):
    """What a picture's file says of its making."""

    info: str
    """The infotext, empty if there is none."""
    items: dict[str, Any]
    """The metadata of the file."""
    parameters: dict[str, str]
    """The settings of the infotext by their names, prompts among them."""


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """`POST /sdapi/v1/png-info`, `extra-single-image` and `extra-batch-images`."""
    router = APIRouter(prefix="/sdapi/v1", route_class=route_class, tags=["AUTOMATIC1111"])

    async def enlarged(how: EnlargeRequest, images: list[bytes], request: Request) -> tuple[str, list[str]]:
        """How pictures were enlarged, as HTML, and the pictures."""
        caller = caller_of(request)
        options = Options.of(await ingress.caller_state.options(caller.key))
        series = [enlarging(how, image, options) for image in images]

        async def work() -> list[Upscaled]:
            return [await ingress.upscaling.upscale(params, caller) for params in series]

        done = await until_disconnect(request, work())
        told = dict.fromkeys(f"{one.plan.upscaler}: {one.plan.width}x{one.plan.height}" for one in done)
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in told)
        return lines, [base64.b64encode(one.image.data).decode() for one in done]

    @router.post("/png-info")
    async def png_info(body: Annotated[PictureRequest, Body()]) -> PngInfoReply:
        """What a picture's file tells of itself, in A1111's words."""
        picture, most = picture_of(body.image), ingress.limits.max_image_pixels
        return described(await asyncio.to_thread(check_image, picture, "image", most))

    @router.post("/extra-single-image")
    async def extra_single_image(body: Annotated[EnlargeOneRequest, Body()], request: Request) -> EnlargedReply:
        """Enlarge a picture."""
        lines, (image,) = await enlarged(body, [picture_of(body.image)], request)
        return EnlargedReply(html_info=lines, image=image)

    @router.post("/extra-batch-images")
    async def extra_batch_images(body: Annotated[EnlargeManyRequest, Body()], request: Request) -> EnlargedManyReply:
        """Enlarge pictures, one after the other."""
        if not body.imageList:
            raise InvalidValueError("imageList is empty: send pictures in base64", "imageList")
        lines, images = await enlarged(body, [picture_of(one.data) for one in body.imageList], request)
        return EnlargedManyReply(html_info=lines, images=images)

    return router


def picture_of(image: str | None) -> bytes:
    """The bytes of a picture; raises InvalidValueError where there are none."""
    data = decode_base64(image or None, "image")
    if data is None:
        raise InvalidValueError("image is missing: send it in base64", "image")
    return data


def enlarging(how: EnlargeRequest, image: bytes, options: Options) -> UpscaleParams:
    """The parameters of one picture's enlargement.

    Raises:
        InvalidValueError: something that is not possible here.
    """
    for name in ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility"):
        if getattr(how, name) > 0:
            reason = "one upscaler works alone" if "upscaler" in name else "there is no face restorer"
            raise InvalidValueError(f"{name} {getattr(how, name):g} is not possible here: {reason}. Leave it out", name)
    nothing = how.upscaler_1.strip().casefold() in ("", "none")
    return UpscaleParams(
        image=image,
        upscaler="lanczos" if nothing else how.upscaler_1,
        scale=1.0 if nothing else _scale(how, image),
        output_format=options.file_format,
        output_quality=options.quality,
    )


def _scale(how: EnlargeRequest, image: bytes) -> float:
    if how.resize_mode == 0:
        return how.upscaling_resize
    width, height = picture_size(image, "image")
    wanted = (how.upscaling_resize_w, how.upscaling_resize_h)
    if how.upscaling_crop and width * wanted[1] != height * wanted[0]:
        raise InvalidValueError(
            f"upscaling_crop of a picture of {width}x{height} to {wanted[0]}x{wanted[1]} is not possible here: send a "
            "size of its shape, or upscaling_crop false",
            "upscaling_crop",
        )
    return max(wanted[0] / width, wanted[1] / height)


def described(file: PictureFile) -> PngInfoReply:
    """The reply for a file, whichever program wrote it."""
    text = file.infotext or ""
    parsed = parse_infotext(text) if text else None
    parameters = {} if parsed is None else {"Prompt": parsed[0], "Negative prompt": parsed[1] or ""} | parsed[2]
    return PngInfoReply(info=text, items={"parameters": text} if text else {}, parameters=parameters)
