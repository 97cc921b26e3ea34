"""Lists of models, samplers and other names, from the tables that validate requests; health routes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute

from config.catalog import Catalog, ModelSpec
from deployments.ingress.ingress import Ingress
from pipelines.library.embeddings import EMBEDDING
from pipelines.library.loras import ADAPTERS
from pipelines.plan import CompiledSize
from pipelines.sampling.samplers import SAMPLERS


def routes(ingress: Ingress, route_class: type[APIRoute]) -> APIRouter:
    """Models, samplers, styles, LoRAs, embeddings and ControlNets under `/v1`, and `POST /v1/loras/refresh`."""
    router = APIRouter(prefix="/v1", route_class=route_class, tags=["offers"])

    async def current() -> Catalog:
        """The catalog with the library as it is now, give or take a second."""
        await ingress.library.changed()
        return ingress.catalog

    def describe(model: ModelSpec, catalog: Catalog, compiled: list[CompiledSize]) -> dict[str, Any]:
        return {
            "id": model.name,
            "aliases": list(model.aliases),
            "object": "model",
            "created": 0,
            "owned_by": "sdgraph",
            "family": model.family,
            "defaults": model.defaults.model_dump(),
            "size_multiple": model.size_multiple,
            "sizes": [str(size) for size in model.sizes],
            "tvm_sizes": [str(size) for size in model.tvm_sizes],
            "tvm_compiled": [
                {"size": str(entry), "speedup": round(entry.speedup, 2), "precision": entry.precision}
                for entry in compiled
                if entry.component == model.unet and entry.control == model.requires_controlnet
            ],
            "tvm_compiling": [
                {"size": str(entry), "state": entry.state}
                for entry in ingress.compiled.pending()
                if entry.component == model.unet and entry.control == model.requires_controlnet
            ],
            "tvm_refused": [
                {"size": str(entry), "reason": entry.reason}
                for entry in ingress.compiled.refused()
                if entry.component == model.unet and entry.control == model.requires_controlnet
            ],
            "on_a_gpu": ingress.acceleration.model_dump(),
            "refiner": model.refiner is not None,
            "inpainting": catalog.component(model.unet).inpainting,
            "controlnets": list(catalog.controls_of(model.name)),
            "requires_controlnet": model.requires_controlnet,
            "loras": [e.name for e in catalog.loras if e.unavailable is None and model.unet in e.bases],
            "embeddings": [e.name for e in catalog.embeddings if e.unavailable is None and model.unet in e.bases],
        }

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """Models that can be asked for now; under `unavailable` the others, and files of the library, with reasons."""
        compiled, catalog = await ingress.compiled.available_sizes(), await current()
        listed = _listing([describe(model, catalog, compiled) for model in catalog.available_models()])
        refused = [{"id": m.name, "reason": m.unavailable} for m in catalog.models if m.unavailable is not None]
        files = [
            {"id": e.name, "kind": e.kind, "reason": f"{e.file}: {e.reason}"}
            for e in catalog.unserved
            if e.kind not in (*ADAPTERS, EMBEDDING)
        ]
        return {**listed, "unavailable": [*refused, *files]}

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
        return _listing([style.model_dump() for style in ingress.catalog.styles])

    @router.get("/loras")
    async def lora_names() -> dict[str, Any]:
        """LoRAs: which are served, and why the others are not."""
        return _listing(_loras(await current()))

    @router.post("/loras/refresh")
    async def refresh() -> dict[str, Any]:
        """Read the library now, wait a moment for files that are being copied, and list the LoRAs."""
        await ingress.library.settle()
        return _listing(_loras(ingress.catalog))

    @router.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        """Textual inversions, which prompts say as `<name>`: which are served, and why the others are not."""
        catalog = await current()
        named = [
            {"name": e.name, "available": e.unavailable is None, "reason": e.unavailable} for e in catalog.embeddings
        ]
        return _listing(named + _files(catalog, (EMBEDDING,)))

    @router.get("/controlnets")
    async def controlnets() -> dict[str, Any]:
        """ControlNets of the models that are served, and whether photos become their maps here (`preprocess`)."""
        catalog = await current()
        served, annotated = {model.name for model in catalog.available_models()}, catalog.annotator_names()
        return _listing(
            [
                {"name": c.name, "models": models, "preprocess": c.name in annotated}
                for c in catalog.controlnets
                if (models := sorted(served & set(c.models)))
            ]
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


def _loras(catalog: Catalog) -> list[dict[str, Any]]:
    """Each LoRA with the models it fits, or with the reason why it is not served."""
    users: dict[str, list[str]] = {}
    for model in catalog.available_models():
        users.setdefault(model.unet, []).append(model.name)
    named = [
        {
            "name": e.name,
            "aliases": list(e.aliases),
            "available": e.unavailable is None,
            "reason": e.unavailable,
            "trigger": e.trigger,
            "models": [name for base in e.bases for name in users.get(base, ())],
        }
        for e in catalog.loras
    ]
    return named + _files(catalog, (*ADAPTERS, "unknown"))


def _files(catalog: Catalog, kinds: Collection[str]) -> list[dict[str, Any]]:
    """Files of the library that are not served, with the reasons."""
    return [
        {"name": e.name, "kind": e.kind, "available": False, "reason": f"{e.file}: {e.reason}"}
        for e in catalog.unserved
        if e.kind in kinds
    ]


def _listing(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": entries}
