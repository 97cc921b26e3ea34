"""The cost of a dialect compared with the main route, and the tick of a stream's first partial image.

    python -m benchmarks.dialects

Requests go through the whole application, over a graph whose stages answer at once with a finished file: what is left
is reading the request, planning and writing the reply. Ticks are counted, not timed.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
from PIL import Image

from config.catalog import Catalog
from deployments.graph import Progress, Sealed
from deployments.telemetry.stages import Timed
from pipelines.pictures.images import write_image
from pipelines.plan import GenerationParams, GenerationPlan, OutputFormat
from pipelines.planning import make_plan
from tests.support.graph import FakeGraph, denoised
from tests.support.ingress import open_client

ROUNDS = 400
PICTURE = Image.effect_noise((512, 512), 20).convert("RGB")
KINDS: tuple[OutputFormat, ...] = ("jpeg", "png")
FILES = {kind: write_image(PICTURE, kind) for kind in KINDS}
PROMPT = {"prompt": "a penguin in the snow"}
HYPERBOLIC = {"model_name": "SD1.5", "width": 512, "height": 512, "seed": 7, "output_format": "jpeg"} | PROMPT
OPENAI = {"model": "gpt-image-1", "size": "512x512", "seed": 7, "output_format": "jpeg"} | PROMPT
INFERENCE = {"inputs": PROMPT["prompt"], "parameters": {"width": 512, "height": 512, "seed": 7}}
WEBUI = {"width": 512, "height": 512, "seed": 7, "override_settings": {"samples_format": "jpg"}} | PROMPT
Send = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
ROUTES: dict[str, Send] = {
    "main route, watched": lambda client: client.post("/v1/image/generation", json=HYPERBOLIC | {"stream": True}),
    "main route": lambda client: client.post("/v1/image/generation", json=HYPERBOLIC),
    "main route, bytes": lambda client: client.post(
        "/v1/image/generation", json=HYPERBOLIC, headers={"accept": "image/jpeg"}
    ),
    "OpenAI generations": lambda client: client.post("/v1/images/generations", json=OPENAI),
    "Hugging Face URL": lambda client: client.post("/models/SD1.5", json=INFERENCE),
    "A1111 txt2img": lambda client: client.post("/sdapi/v1/txt2img", json=WEBUI),
}


async def decode(*, plan: GenerationPlan, **_: Any) -> Timed[Any]:
    """A finished file at once."""
    return Timed(FILES[plan.output_format], ())


async def milliseconds(client: httpx.AsyncClient) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of each route, by the clock and of this process's CPU time; their requests alternate."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ROUTES}
    for _ in range(ROUNDS):
        for name, send in ROUTES.items():
            begin, computing = time.perf_counter(), time.process_time()
            reply = await send(client)
            taken[name].append((time.perf_counter() - begin, time.process_time() - computing))
            reply.raise_for_status()
    clock, cpu = ({n: round(1000 * statistics.median(t[i] for t in ts), 3) for n, ts in taken.items()} for i in (0, 1))
    return clock, cpu


async def first_partial(catalog: Catalog, steps: int, partials: int) -> list[int]:
    """The tick after which each partial image of a stream was requested from the VAE."""
    done, shown = [0], []

    async def denoise(**_: Any) -> AsyncGenerator[Any, None]:
        for step in range(1, steps + 1):
            done[0] = step
            yield Progress("unet-sd15", step, steps, latents=Sealed(b""))
        yield Sealed(b"")

    async def preview(**_: Any) -> bytes:
        shown.append(done[0])
        return FILES["jpeg"].data

    graph = FakeGraph(denoise_watched=denoise, preview=preview, decode=decode)
    async with open_client(graph=graph, catalog=catalog) as client:
        body = OPENAI | {"stream": True, "partial_images": partials, "steps": steps}
        (await client.post("/v1/images/generations", json=body)).raise_for_status()
    return shown


async def main() -> dict[str, Any]:
    """Everything."""
    catalog = Catalog.load("tiny")
    async with open_client(graph=FakeGraph(decode=decode, denoise_watched=denoised), catalog=catalog) as client:
        clock, cpu = await milliseconds(client)
    return {
        "milliseconds": clock,
        "over the main route": {name: round(t - clock["main route"], 3) for name, t in clock.items()},
        "of CPU time": cpu,
        "of CPU time over the main route": {name: round(t - cpu["main route"], 3) for name, t in cpu.items()},
        "ticks before each partial image, 30 steps": await first_partial(catalog, 30, 3),
        "writing a 512 px JPEG": {"bare": bare_jpeg(), "marked": marked_jpeg(catalog)},
    }


def bare_jpeg() -> dict[str, float]:
    """Pillow alone."""
    return _writing(_saved)


def marked_jpeg(catalog: Catalog) -> dict[str, float]:
    """With XMP, plan and infotext."""
    plan = make_plan(GenerationParams(model_name="SD1.5", prompt=PROMPT["prompt"]), catalog)
    return _writing(lambda: write_image(PICTURE, "jpeg", plan).data)


def _saved() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _writing(write: Callable[[], bytes]) -> dict[str, float]:
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        data = write()
        times.append((time.perf_counter() - begin) * 1000)
    return {"ms": round(statistics.median(times), 2), "bytes": len(data), "base64": len(base64.b64encode(data))}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main()), indent=2))
