"""The routes of A1111's ControlNet extension."""

from __future__ import annotations

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.routing import APIRoute
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from config.catalog import Catalog
from config.choices import Choices, UnknownChoiceError
from deployments.api.a1111.units import NO_MODULE
from deployments.api.admission import caller_of
from deployments.api.connection import until_disconnect
from deployments.api.encoding import decode_base64
from deployments.api.nulls import NullsAbsent
from deployments.ingress.ingress import Ingress
from pipelines.errors import InvalidValueError

VERSION = 3
"""Of the extension's API."""
MOST_PHOTOS = 10
"""Of one `detect`."""


class DetectRequest(NullsAbsent):
    """Photos to make control maps of. `processor_res` and thresholds are fixed here."""

    model_config = ConfigDict(extra="ignore")

    controlnet_module: str = Field(NO_MODULE, max_length=200, description="See /controlnet/module_list.")
    controlnet_input_images: list[str] = Field(
        [],
        max_length=MOST_PHOTOS,
        validation_alias=AliasChoices("controlnet_input_images", "controlnet_images"),
        description="In base64 or as data URIs; webuiapi calls them controlnet_images.",
    )


class DetectReply(BaseModel):
    """Their control maps."""

    images: list[str]
    """PNG, in base64."""
    info: str


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """Everything under `/controlnet`."""
    router = APIRouter(prefix="/controlnet", route_class=route_class, tags=["AUTOMATIC1111"])

    @router.get("/version")
    async def version() -> dict[str, int]:
        """Of the API that is spoken here."""
        return {"version": VERSION}

    @router.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        """What a unit's `model` may be; which of them a checkpoint takes, an error tells."""
        return {"model_list": list(models(ingress.catalog))}

    @router.get("/module_list")
    async def module_list() -> dict[str, Any]:
        """What a unit's `module` may be. Their settings are fixed."""
        names = [NO_MODULE, *ingress.catalog.annotator_names()]
        return {
            "module_list": names,
            "module_detail": {n: {"model_free": n == NO_MODULE, "sliders": []} for n in names},
        }

    @router.post("/detect")
    async def detect(body: Annotated[DetectRequest, Body()], request: Request) -> DetectReply:
        """Make control maps of photos, in the photos' own sizes."""
        name, component = _annotator(body.controlnet_module, ingress.catalog)
        if not body.controlnet_input_images:
            raise InvalidValueError("controlnet_input_images: no picture; send them in base64", INPUTS)
        photos = [decode_base64(text, INPUTS) or b"" for text in body.controlnet_input_images]

        async def work() -> list[bytes]:
            caller = caller_of(request)
            return [await ingress.annotating.annotate(component, name, photo, caller) for photo in photos]

        maps = await until_disconnect(request, work())
        return DetectReply(images=[base64.b64encode(data).decode() for data in maps], info="Success")

    return router


INPUTS = "controlnet_input_images"


def _annotator(module: str, catalog: Catalog) -> tuple[str, str]:
    """The annotator of a module, and a ControlNet where it lives."""
    served = {component.id for component in catalog.served_components()}
    names = {
        control.name: control.component
        for control in reversed(catalog.controlnets)
        if control.name in catalog.annotator_names() and control.component in served
    }
    try:
        name = Choices("controlnet_module", names).resolve(module)
    except UnknownChoiceError as error:
        raise InvalidValueError(str(error), "controlnet_module") from None
    return name, names[name]


def models(catalog: Catalog) -> tuple[str, ...]:
    """Names of the ControlNets of served models."""
    served = {model.name for model in catalog.available_models()}
    return tuple(dict.fromkeys(control.name for control in catalog.controlnets if served & set(control.models)))
