"""The routes of A1111's web API, except those of ControlNet and extras."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel

from config.catalog import Catalog
from deployments.api.a1111 import controlnet, errors, extras, listings, replies
from deployments.api.a1111.jobs import Job
from deployments.api.a1111.options import Options
from deployments.api.a1111.requests import Img2ImgRequest, Txt2ImgRequest, WebuiReply, WebuiRequest
from deployments.api.a1111.translation import translated
from deployments.api.admission import Admission, caller_of
from deployments.api.connection import describe, until_disconnect
from deployments.ingress.ingress import Ingress

TAGS: list[str | Enum] = ["AUTOMATIC1111"]


class OrderReply(BaseModel):
    """How many of the caller's requests an order reached; A1111's reply is empty."""

    requests: int


def routers(ingress: Ingress, admission: Admission) -> list[APIRouter]:
    """Everything under `/sdapi/v1` and `/controlnet`."""
    prefix = "/sdapi/v1"
    drawing = APIRouter(prefix=prefix, route_class=admission.route_class(errors.answer_drawing), tags=TAGS)
    _drawing(drawing, ingress)
    router = APIRouter(prefix=prefix, route_class=admission.route_class(errors.answer), tags=TAGS)
    _options(router, ingress)
    _work(router, ingress)
    _listings(router, ingress)
    enlarging = extras.routes(ingress, admission.route_class(errors.answer_extras))
    return [drawing, router, enlarging, controlnet.routes(ingress, router.route_class)]


def _drawing(router: APIRouter, ingress: Ingress) -> None:
    async def draw(body: WebuiRequest, request: Request) -> Response:
        caller = caller_of(request)
        options = Options.of(await ingress.caller_state.options(caller.key), body.override_settings)
        read = (body, options, ingress.catalog, ingress.limits.max_image_pixels)
        pictured = body.alwayson_scripts or (isinstance(body, Img2ImgRequest) and body.mask)
        ours = await asyncio.to_thread(translated, *read) if pictured else translated(*read)
        pictures = await until_disconnect(request, Job(ours).draw(ingress, caller))
        maps = [await ingress.annotating.annotate(m.component, m.name, m.photo, caller) for m in ours.maps]
        reply = Response(replies.whole(body, ours, pictures, maps), media_type="application/json")
        if pictures:
            describe(reply, pictures[0])
        return reply

    @router.post("/txt2img", response_model=WebuiReply)
    async def txt2img(body: Annotated[Txt2ImgRequest, Body()], request: Request) -> Response:
        """Draw pictures of a text."""
        return await draw(body, request)

    @router.post("/img2img", response_model=WebuiReply)
    async def img2img(body: Annotated[Img2ImgRequest, Body()], request: Request) -> Response:
        """Draw pictures from a picture, or a part of it."""
        return await draw(body, request)


def _options(router: APIRouter, ingress: Ingress) -> None:
    @router.get("/options")
    async def options(request: Request) -> dict[str, Any]:
        """The caller's options."""
        kept = await ingress.caller_state.options(caller_of(request).key)
        return Options.of(kept).shown(ingress.catalog)

    @router.post("/options")
    async def set_options(body: Annotated[dict[str, Any], Body()], request: Request) -> None:
        """Change some of the caller's options; null is the default again. Those that mean nothing here are ignored."""
        key = caller_of(request).key
        kept = {n: value for n, value in (await ingress.caller_state.options(key)).items() if n not in body}
        changed = Options.of(kept, body)
        changed.check(changed.model(ingress.catalog))
        await ingress.caller_state.keep_options(key, changed.kept())


def _work(router: APIRouter, ingress: Ingress) -> None:
    @router.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> replies.ProgressReply:
        """How far the caller's oldest request is; without `skip_current_image` the next preview shows its picture."""
        key = caller_of(request).key
        states = await ingress.caller_state.states(key)
        if states and not skip_current_image:
            await ingress.caller_state.order(key, "show")
        return replies.progress(states, not skip_current_image)

    @router.post("/interrupt")
    async def interrupt(request: Request) -> OrderReply:
        """End the caller's requests, and no others: finished pictures are sent, the rest is left out."""
        return OrderReply(requests=await ingress.caller_state.order(caller_of(request).key, "interrupt"))

    @router.post("/skip")
    async def skip(request: Request) -> OrderReply:
        """Leave out the first unfinished batch of each of the caller's requests."""
        return OrderReply(requests=await ingress.caller_state.order(caller_of(request).key, "skip"))


def _listings(router: APIRouter, ingress: Ingress) -> None:
    async def current() -> Catalog:
        """The catalog with the library as it is now, give or take a second."""
        await ingress.library.changed()
        return ingress.catalog

    @router.get("/sd-models")
    async def sd_models() -> listings.Listing:
        """Models, as checkpoints."""
        return listings.sd_models(await current())

    @router.get("/samplers")
    async def samplers() -> listings.Listing:
        """Samplers, without schedule types."""
        return listings.samplers()

    @router.get("/schedulers")
    async def schedulers() -> listings.Listing:
        """Schedule types."""
        return listings.schedulers()

    @router.get("/upscalers")
    async def upscalers() -> listings.Listing:
        """What enlarges pictures."""
        return listings.upscalers(ingress.catalog)

    @router.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> listings.Listing:
        """What enlarges latents."""
        return listings.latent_upscale_modes()

    @router.get("/loras")
    async def loras() -> listings.Listing:
        """LoRAs."""
        return listings.loras(await current())

    @router.get("/embeddings")
    async def embeddings() -> dict[str, dict[str, Any]]:
        """Textual inversions."""
        return listings.embeddings(await current())

    @router.get("/sd-vae")
    async def sd_vae() -> listings.Listing:
        """VAEs."""
        return listings.sd_vae(ingress.catalog)

    @router.get("/prompt-styles")
    async def prompt_styles() -> listings.Listing:
        """Styles."""
        return listings.prompt_styles(ingress.catalog)

    for name in ("hypernetworks", "face-restorers", "realesrgan-models"):
        router.add_api_route(f"/{name}", _nothing, summary=f"There are no {name} here.", name=name)

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """Scripts that clients look for: by the second one they know that ControlNets are here."""
        return {"txt2img": listings.SCRIPTS, "img2img": listings.SCRIPTS}

    @router.get("/script-info")
    async def script_info() -> listings.Listing:
        """What `alwayson_scripts` takes."""
        return [
            {"name": "controlnet", "is_alwayson": True, "is_img2img": is_img2img, "args": []}
            for is_img2img in (False, True)
        ]

    @router.get("/cmd-flags")
    async def cmd_flags() -> dict[str, Any]:
        """Flags of A1111's command line that would give this server."""
        return {"api": True, "nowebui": True, "no_half": False, "listen": False}

    @router.get("/memory")
    async def memory() -> dict[str, dict[str, str]]:
        """Not told: memory is that of many processes; this server's metrics have each one's."""
        return {part: {"error": "not told here: see the metrics of this server"} for part in ("ram", "cuda")}

    async def refresh() -> None:
        """Read the library now, and wait a moment for files that are being copied."""
        await ingress.library.settle()

    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings"):
        router.add_api_route(f"/{name}", refresh, methods=["POST"], name=name)


async def _nothing() -> list[dict[str, Any]]:
    """An empty list."""
    return []
