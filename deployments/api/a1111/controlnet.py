"""The routes of A1111's ControlNet extension, and its units in a request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute

from config.catalog import Catalog
from deployments.ingress.ingress import Ingress

VERSION = 3
"""Of the extension's API."""
NO_MODULE = "none"


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

    return router


def models(catalog: Catalog) -> tuple[str, ...]:
    """Names of the ControlNets of served models."""
    served = {model.name for model in catalog.available_models()}
    return tuple(dict.fromkeys(control.name for control in catalog.controlnets if served & set(control.models)))
