"""`POST /v1/images/upscale` enlarges a picture; `GET /v1/upscalers` lists the upscalers."""

from __future__ import annotations

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from config.catalog import Catalog
from config.upscalers import LATENT_METHODS, PICTURE_METHODS
from deployments.api import raw
from deployments.api.admission import caller_of
from deployments.api.connection import until_disconnect
from deployments.api.forms import documented, fields_of, validated
from deployments.api.info import picture_in
from deployments.ingress.ingress import Ingress
from deployments.telemetry.stages import server_timing
from pipelines.enlargement import MAX_SCALE, MIN_SCALE
from pipelines.plan import OutputFormat
from pipelines.upscale import UpscaleParams, default_upscaler


class UpscaleRequest(BaseModel):
    """A picture and how it is enlarged. Unknown fields are ignored, `null` and empty ones are absent."""

    model_config = ConfigDict(extra="ignore")

    image: Annotated[bytes | str, Field(description="Base64 PNG, JPEG or WebP, or a data URI; in a form, the file.")]
    upscaler: str | None = Field(
        None, max_length=200, description="See /v1/upscalers; the first model there, else lanczos, by default."
    )
    scale: FiniteFloat | None = Field(
        None, ge=MIN_SCALE, le=MAX_SCALE, description="How many times as wide and as high; default 2."
    )
    output_format: OutputFormat | None = Field(None, description="Default png.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP; default 95.")


class UpscaledImage(BaseModel):
    """The larger picture."""

    index: int
    image: str
    """Base64, no data-URI prefix."""


class UpscaleResponse(BaseModel):
    """The reply, in the form of a drawn picture's."""

    images: list[UpscaledImage]
    inference_time: float
    """Seconds between the parsed request and the finished picture."""
    width: int
    height: int
    upscaler: str


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """Both routes."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["images"])

    @router.post(
        "/images/upscale",
        response_model=UpscaleResponse,
        responses={200: {"description": "The picture; as `Accept` asks, its bytes.", "content": raw.DOCUMENTED}},
        openapi_extra=dict(documented(UpscaleRequest, ["image"], ["image"])),
    )
    async def upscale(request: Request, response: Response) -> UpscaleResponse | Response:
        """Enlarge a picture."""
        fields = await fields_of(request, ingress.limits.max_body_bytes)
        given = {name: value for name, value in fields.items() if value is not None and value != ""}
        image = picture_in(given)
        asked = validated(UpscaleRequest, given | {"image": image})
        params = UpscaleParams(
            image=image,
            upscaler=asked.upscaler,
            scale=asked.scale,
            output_format=asked.output_format or raw.accepted_format(request) or "png",
            output_quality=asked.output_compression,
        )
        done = await until_disconnect(request, ingress.upscaling.upscale(params, caller_of(request)))
        timing = {"server-timing": server_timing(done.times)}
        if raw.wants_bytes(request):
            return Response(done.image.data, media_type=f"image/{done.image.format}", headers=timing)
        response.headers.update(timing)
        return UpscaleResponse(
            images=[UpscaledImage(index=0, image=base64.b64encode(done.image.data).decode())],
            inference_time=round(done.seconds, 4),
            width=done.plan.width,
            height=done.plan.height,
            upscaler=done.plan.upscaler,
        )

    @router.get("/upscalers")
    async def upscalers() -> dict[str, Any]:
        """What enlarges pictures: models, resizing, and for a second pass the interpolation of latents."""
        return {"object": "list", "data": listed(ingress.catalog)}

    return router


def listed(catalog: Catalog) -> list[dict[str, Any]]:
    """Every upscaler: whether it is a model, where it can be named, and which one is the default of a sent picture."""
    default = default_upscaler(catalog)
    models = [(entry.name, list(entry.aliases), "model") for entry in catalog.upscalers]
    plain = [(name, list[str](), "resize") for name in PICTURE_METHODS]
    latent = [(name, list[str](), "latent") for name in LATENT_METHODS]
    return [
        {
            "name": name,
            "aliases": aliases,
            "kind": kind,
            "upscale": kind != "latent",
            "hires": True,
            "default": name == default,
        }
        for name, aliases, kind in (*models, *plain, *latent)
    ]
