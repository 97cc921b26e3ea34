"""What this server offers, read from the tables that validate requests; whether it lives and can serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute

from config.catalog import ModelSpec
from deployments.ingress.ingress import Ingress
from pipelines.plan import CompiledSize
from pipelines.sampling.samplers import SAMPLERS


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """`GET /v1/models`, `/v1/samplers`, `/v1/styles`, `/v1/loras`, `/v1/controlnets`."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["offers"])
    catalog = ingress.catalog
    loras = [entry for entry in catalog.loras if entry.unavailable is None]

    def describe(model: ModelSpec, compiled: list[CompiledSize]) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "sdgraph",
            "family": model.family,
            "defaults": model.defaults.model_dump(),
            "size_multiple": model.size_multiple,
            "sizes": [str(size) for size in model.sizes],
            "tvm_sizes": [str(size) for size in model.tvm_sizes],
            "tvm_compiled": [
                {"size": str(entry), "speedup": round(entry.speedup, 2)}
                for entry in compiled
                if entry.component == model.unet and entry.control == model.requires_controlnet
            ],
            "on_a_gpu": ingress.acceleration.model_dump(),
            "refiner": model.refiner is not None,
            "controlnets": list(catalog.controls_of(model.name)),
            "loras": [entry.name for entry in loras if model.unet in entry.bases],
        }

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """Models that can be asked for now."""
        compiled = await ingress.compiled.available_sizes()
        return _listing([describe(model, compiled) for model in catalog.available_models()])

    @router.get("/samplers")
    async def samplers() -> dict[str, Any]:
        """Sampler names, with the diffusers scheduler each stands for."""
        return _listing(
            [
                {"name": name, "scheduler": s.scheduler, "max_steps": s.max_steps, "edm_models_only": s.edm}
                for name, s in SAMPLERS.items()
            ]
        )

    @router.get("/styles")
    async def styles() -> dict[str, Any]:
        """Style presets with their templates."""
        return _listing([style.model_dump() for style in catalog.styles])

    @router.get("/loras")
    async def lora_names() -> dict[str, Any]:
        """LoRAs: which are served, and why the others are not."""
        return _listing(
            [
                {"name": e.name, "available": e in loras, "reason": e.unavailable, "trigger": e.trigger}
                for e in catalog.loras
            ]
        )

    @router.get("/controlnets")
    async def controlnets() -> dict[str, Any]:
        """ControlNets of the models that are served."""
        served = {model.name for model in catalog.available_models()}
        return _listing(
            [{"name": c.name, "models": m} for c in catalog.controlnets if (m := sorted(served & set(c.models)))]
        )

    return router


def health_routes(ingress: Ingress) -> APIRouter:
    """`GET /healthz` and `/readyz`, which ask for no key."""
    router = APIRouter(tags=["health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz")
    async def readyz(response: Response) -> dict[str, Any]:
        """200 when every deployment can serve, else 503; the state of each, and why."""
        ready, states = await ingress.readiness()
        response.status_code = 200 if ready else 503
        return {"status": "ready" if ready else "waiting", "deployments": dict(states)}

    return router


def _listing(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": entries}
