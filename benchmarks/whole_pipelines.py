"""The usual design, for comparison: Ray Serve replicas of whole diffusers pipelines, one request at a time."""

import base64
import io
import random
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pydantic import BaseModel
from ray import serve
from starlette.requests import Request

from config.catalog import ROOT

TINY = ROOT / "models" / "tiny"


class Args(BaseModel):
    """How many replicas, and how many threads each."""

    replicas: int = 2
    threads: int = 1


LORAS = {"Pixel_Art": "lora-pixel", "Add_Detail": "lora-detail"}


class WholePipelines:
    """Five models as whole diffusers pipelines in one process, LoRAs loaded once and switched for each request."""

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
        # A pipeline of its own, as usual: LoRAs sit in the UNet, and a UNet under two pipelines would share them.
        net = diffusers.ControlNetModel.from_pretrained(TINY / "controlnet-sd15-canny")
        parts = sd.from_pretrained(TINY / "sd15").components
        controlled = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
        self._pipelines["SD1.5-ControlNet"] = controlled
        for model, base in {"SD1.5": "sd15", "SD1.5-ControlNet": "sd15", "SDXL1.0-base": "sdxl"}.items():
            for name, folder in LORAS.items():
                self._pipelines[model].load_lora_weights(TINY / f"{folder}-{base}", adapter_name=name)
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
        from pipelines.sampling.samplers import SAMPLERS

        spec = SAMPLERS[body["sampler"]]
        pipe = self._pipelines[body["model_name"]]
        scheduler = getattr(self._diffusers, spec.scheduler)
        pipe.scheduler = scheduler.from_config(self._configs[body["model_name"]], **spec.settings)
        seed = body.get("seed", random.randrange(2**32))
        if "loras" in body:
            if body["loras"]:
                pipe.enable_lora()
                pipe.set_adapters(list(body["loras"]), list(body["loras"].values()))
            else:
                pipe.disable_lora()
        extra = {}
        if "controlnet_image" in body:
            photo = Image.open(io.BytesIO(base64.b64decode(body["controlnet_image"]))).convert("RGB")
            photo = photo.resize((body["width"], body["height"]))
            extra["image"] = Image.fromarray(cv2.Canny(np.asarray(photo), 100, 200)).convert("RGB")
        image = pipe(
            body["prompt"],
            **extra,
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
