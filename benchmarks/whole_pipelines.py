"""The usual way, to compare with: Ray Serve replicas of whole diffusers pipelines, one request at a time."""

import base64
import io
import random
from typing import Any

from pydantic import BaseModel
from ray import serve
from starlette.requests import Request

from config.catalog import ROOT

TINY = ROOT / "models" / "tiny"


class Args(BaseModel):
    """How many replicas, and how many threads each."""

    replicas: int = 2
    threads: int = 1


class WholePipelines:
    """Four models as whole diffusers pipelines in one process."""

    def __init__(self, threads: int) -> None:
        import diffusers
        import torch

        torch.set_num_threads(threads)
        self._torch, self._diffusers = torch, diffusers
        sd, xl = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
        self._pipelines = {
            "SD1.5": sd.from_pretrained(TINY / "sd15"),
            "SD2": sd.from_pretrained(TINY / "sd2"),
            "SDXL1.0-base": xl.from_pretrained(TINY / "sdxl"),
            "SSD": xl.from_pretrained(TINY / "ssd"),
        }
        self._configs = {name: pipe.scheduler.config for name, pipe in self._pipelines.items()}
        for pipe in self._pipelines.values():
            pipe.set_progress_bar_config(disable=True)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Draw one picture, end to end, alone."""
        if request.method == "GET":
            return {"status": "ready"}
        body = await request.json()
        return self._draw(body)

    def _draw(self, body: dict[str, Any]) -> dict[str, Any]:
        from pipelines.samplers import SAMPLERS

        spec = SAMPLERS[body["sampler"]]
        pipe = self._pipelines[body["model_name"]]
        scheduler = getattr(self._diffusers, spec.scheduler)
        pipe.scheduler = scheduler.from_config(self._configs[body["model_name"]], **spec.settings)
        seed = body.get("seed", random.randrange(2**32))
        image = pipe(
            body["prompt"],
            width=body["width"],
            height=body["height"],
            num_inference_steps=body["steps"],
            guidance_scale=body["cfg_scale"],
            generator=self._torch.Generator().manual_seed(seed),
        ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        picture = base64.b64encode(buffer.getvalue()).decode()
        return {"images": [{"index": 0, "image": picture, "random_seed": seed}]}


def build_app(args: Args) -> serve.Application:
    """The deployment; `import_path` of the benchmark's Serve config."""
    deployment = serve.deployment(
        WholePipelines,
        num_replicas=args.replicas,
        max_ongoing_requests=1,
        max_queued_requests=-1,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(args.threads)
