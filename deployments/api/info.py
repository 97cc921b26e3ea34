"""`POST /v1/images/info`: the metadata of a picture's file, and the request that draws it again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config.catalog import Catalog
from config.choices import UnknownChoiceError
from deployments.api.encoding import decode_base64
from deployments.api.forms import documented, fields_of
from deployments.ingress.ingress import Ingress
from pipelines.errors import InvalidValueError
from pipelines.pictures.images import PictureFile, check_image
from pipelines.pictures.infotext import parse_infotext, request_fields
from pipelines.pictures.provenance import VOCABULARY
from pipelines.plan import GenerationPlan, OutputFormat, StagePlan, TextReading
from pipelines.upscale import UpscalePlan


class InfoRequest(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="ignore")

    image: Annotated[bytes | str, Field(description="Base64 PNG, JPEG or WebP, or a data URI; in a form, the file.")]


class InfoResponse(BaseModel):
    """The metadata of a picture's file; what it lacks is null."""

    format: OutputFormat
    width: int
    height: int
    digital_source_type: str | None
    """IPTC's marking of how the picture was made, as a URI."""
    plan: dict[str, Any] | None
    """What this project decided about a picture of its own."""
    infotext: str | None
    """A1111's text."""
    parameters: dict[str, str] | None
    """The pairs of the infotext's last line, as they stand there."""
    request: dict[str, Any] | None
    """Fields for `POST /v1/image/generation` that draw it again."""
    needs: list[str]
    """Fields of pictures that the request lacks: files do not contain the pictures they were made of."""


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """`POST /v1/images/info`."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["images"])

    @router.post(
        "/images/info", response_model=InfoResponse, openapi_extra=dict(documented(InfoRequest, ["image"], ["image"]))
    )
    async def info(request: Request) -> InfoResponse:
        """Read what a picture's file tells of itself; of this project's pictures, A1111's and its relatives'."""
        data = picture_in(await fields_of(request, ingress.limits.max_body_bytes))
        file = await asyncio.to_thread(check_image, data, "image", ingress.limits.max_image_pixels)
        return described(file, ingress.catalog)

    return router


def picture_in(fields: dict[str, Any]) -> bytes:
    """The one picture of a body: `image`, or `file` as upload forms call it.

    Raises:
        InvalidValueError: none, several, or one that is not base64.
        RequestValidationError: something that is neither text nor a file.
    """
    image = fields.get("image", fields.get("file"))
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, list) and all(isinstance(one, bytes | str) for one in image):
        raise InvalidValueError(f"image: {len(image)} pictures; send one", "image")
    if image is None or image in ("", b""):
        raise InvalidValueError("image is missing: send it in base64, or as the file of a form", "image")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise RequestValidationError([{"type": "string_type", "loc": ("body", "image"), "msg": "Input should be text"}])
    decoded = decode_base64(image, "image")
    assert decoded is not None
    return decoded


def described(file: PictureFile, catalog: Catalog) -> InfoResponse:
    """The reply for a file."""
    plan, parsed = _plan(file.plan), parse_infotext(file.infotext) if file.infotext else None
    request: dict[str, Any] | None = None
    needs: list[str] = []
    if isinstance(plan, GenerationPlan):
        request, needs = repeating(plan)
    elif parsed is not None:
        request = request_fields(*parsed)
        if "strength" in request:
            needs = ["image"]
        if {"mask_blur", "inpaint_area", "inpaint_fill"} & request.keys():
            needs.append("mask_image")
        if model := _served(parsed[2].get("Model", ""), catalog):
            request["model_name"] = model
    return InfoResponse(
        format=file.format,
        width=file.width,
        height=file.height,
        digital_source_type=VOCABULARY + file.digital_source_type if file.digital_source_type else None,
        plan=plan.model_dump(mode="json") if plan else None,
        infotext=file.infotext,
        parameters=parsed[2] if parsed else None,
        request=request,
        needs=needs,
    )


def _plan(text: str | None) -> GenerationPlan | UpscalePlan | None:
    """A file's plan; None if it is none of this version's, or only the note that it did not fit into a JPEG."""
    for kind in (GenerationPlan, UpscalePlan):
        with suppress(ValidationError):
            return kind.model_validate_json(text) if text else None
    return None


def _served(name: str, catalog: Catalog) -> str | None:
    try:
        return catalog.model_choices().resolve(name)
    except UnknownChoiceError:
        return None


def repeating(plan: GenerationPlan) -> tuple[dict[str, Any], list[str]]:
    """The request that repeats a plan, and the pictures it lacks. Styles are in its prompts already."""
    first = plan.stages[0]
    prompts, negatives = first.text.prompts, first.text.negative_prompts
    fields: dict[str, Any] = {
        "model_name": plan.model,
        "prompt": prompts[0],
        "width": plan.width,
        "height": plan.height,
        "steps": first.schedule.steps,
        "cfg_scale": first.guidance_scale,
        "sampler": first.sampler,
        "seed": plan.seed,
        "output_format": plan.output_format,
    }
    if negatives is not None:
        fields["negative_prompt"] = negatives[0]
    if prompts[1:] and prompts[1] != prompts[0]:
        fields["prompt_2"] = prompts[1]
    if negatives is not None and negatives[1:] and negatives[1] != negatives[0]:
        fields["negative_prompt_2"] = negatives[1]
    fields |= _how_texts_are_read(first.text.reading) | _how_it_is_guided(first)
    if first.schedule.strength is not None:
        fields["strength"] = first.schedule.strength
    if plan.refined:
        fields["enable_refiner"] = True
    if second := plan.second_pass:
        fields["hires"] = _how_it_is_enlarged(second)
    if first.controls:
        excluded = {"component", "mode"}
        fields["controlnets"] = [
            {"name": use.name, **use.model_dump(exclude_defaults=True, exclude=excluded)} for use in first.controls
        ]
    if first.loras:
        fields["loras"] = {use.name: use.as_requested() for use in first.loras}
    if first.inpaint is not None:
        names = {"blur": "mask_blur", "area": "inpaint_area", "padding": "inpaint_padding", "fill": "inpaint_fill"}
        fields |= {names[name]: value for name, value in first.inpaint.model_dump(exclude_defaults=True).items()}
    lacking = {"image": first.schedule.strength is not None, "mask_image": first.inpaint is not None}
    maps = [f"controlnets.{i}.image" for i in range(len(first.controls))]
    return fields, [name for name, needed in lacking.items() if needed] + maps


def _how_texts_are_read(reading: TextReading) -> dict[str, Any]:
    """The fields that differ from what they are without being sent."""
    changed = reading.model_dump(exclude_defaults=True, exclude={"max_chunks"})
    return {"prompt_syntax" if name == "syntax" else name: value for name, value in changed.items()}


def _how_it_is_enlarged(stage: StagePlan) -> dict[str, Any]:
    """`hires` of a request whose second pass begins with this stage."""
    assert stage.enlargement is not None
    asked = stage.enlargement.model_dump(include={"scale", "upscaler"})
    return asked | {"steps": stage.schedule.steps_run, "strength": stage.schedule.strength}


def _how_it_is_guided(stage: StagePlan) -> dict[str, Any]:
    """The same of guidance and eta."""
    fields = stage.model_dump(exclude_defaults=True, include={"guidance_rescale", "guidance_start", "guidance_end"})
    return fields | stage.schedule.model_dump(exclude_defaults=True, include={"eta"})
