"""A1111's replies: pictures with what is known of them, and how far the work is."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from pydantic import BaseModel

from deployments import __version__
from deployments.api.a1111.asked import Asked
from deployments.api.a1111.requests import Img2ImgRequest, WebuiRequest
from deployments.ingress.ingress import Generated
from pipelines.pictures.infotext import infotext
from pipelines.sampling.a1111 import their_sampler

STAMP = "%Y%m%d%H%M%S"


class ProgressState(BaseModel):
    """What A1111 calls its state; of the caller's oldest request."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    """Batches; 0 while nothing of the caller's is under way."""
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressReply(BaseModel):
    """How far the caller's oldest request is."""

    progress: float = 0.0
    """0 to 1."""
    eta_relative: float = 0.0
    """Seconds that are left if it goes on like this."""
    state: ProgressState = ProgressState()
    current_image: str | None = None
    """The picture in the making, in base64: the last one that was asked for."""
    textinfo: str | None = None


def whole(body: WebuiRequest, asked: Asked, pictures: list[Generated], maps: list[bytes]) -> bytes:
    """A `WebuiReply` of finished pictures, and of control maps behind them, as JSON.

    Base64 has nothing to escape, so nobody looks through megabytes of it.
    """
    files = (*(picture.image.data for picture in pictures), *maps) if body.send_images else ()
    images = b",".join(b'"' + base64.b64encode(data) + b'"' for data in files)
    info = json.dumps(_info(body, asked, pictures), ensure_ascii=False)
    rest = json.dumps({"parameters": _echo(body), "info": info}).encode()
    return b'{"images":[' + images + b"]," + rest[1:]


def _echo(body: WebuiRequest) -> dict[str, Any]:
    """The request without its pictures, unless it wants them back."""
    kept = isinstance(body, Img2ImgRequest) and body.include_init_images
    pictures = {} if kept else {name: None for name in ("init_images", "mask") if name in type(body).model_fields}
    return body.model_dump(mode="json", exclude={"alwayson_scripts", *pictures}) | pictures | {"alwayson_scripts": {}}


def _info(body: WebuiRequest, asked: Asked, pictures: list[Generated]) -> dict[str, Any]:
    params, plans = asked.params, [picture.plan for picture in pictures]
    sampler, schedule = their_sampler(params.sampler or "")
    seeds, negative = [plan.seed for plan in plans], params.negative_prompt or ""
    return {
        "prompt": params.prompt,
        "all_prompts": [params.prompt] * len(plans),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(plans),
        "seed": params.seed,
        "all_seeds": seeds,
        "subseed": params.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": plans[0].width if plans else params.width,
        "height": plans[0].height if plans else params.height,
        "sampler_name": sampler,
        "cfg_scale": params.cfg_scale,
        "steps": params.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": asked.model.name,
        "sd_model_hash": asked.model_hash,
        "sd_vae_name": asked.model.vae,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": params.strength,
        "extra_generation_params": {"Schedule type": schedule},
        "index_of_first_image": 0,
        "infotexts": [infotext(plan) for plan in plans],
        "styles": body.styles,
        "job_timestamp": time.strftime(STAMP),
        "clip_skip": params.clip_skip or 1,
        "is_using_inpainting_conditioning": False,
        "version": f"sdgraph {__version__}",
    }


def progress(states: list[dict[str, Any]], with_image: bool) -> ProgressReply:
    """What is told of a caller's work; idle is 0 of 0."""
    if not states:
        return ProgressReply()
    state = states[0]
    began, share = float(state["began"]), float(state["progress"])
    passed = max(time.time() - began, 0.0)
    return ProgressReply(
        progress=min(share, 1.0),
        eta_relative=passed / share - passed if share > 0 else 0.0,
        state=ProgressState(
            skipped=state["skipped"],
            interrupted=state["interrupted"],
            job=f"Batch {state['batch'] + 1} out of {state['batches']}",
            job_count=state["batches"],
            job_timestamp=time.strftime(STAMP, time.localtime(began)),
            job_no=state["batch"],
            sampling_step=state["step"],
            sampling_steps=state["steps"],
        ),
        current_image=state["image"] if with_image else None,
    )
