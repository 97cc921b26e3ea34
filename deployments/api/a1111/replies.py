"""A1111's replies: pictures with their infotexts, and the progress of requests."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from pydantic import BaseModel

from deployments import __version__
from deployments.api.a1111.requests import Img2ImgRequest, WebuiRequest
from deployments.api.a1111.translation import TranslatedRequest
from deployments.ingress.ingress import Generated
from pipelines.pictures.infotext import infotext
from pipelines.sampling.a1111 import their_sampler

STAMP = "%Y%m%d%H%M%S"


class ProgressState(BaseModel):
    """A1111's state object, for the caller's oldest request."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    """Batches; 0 while no request of the caller is in flight."""
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressReply(BaseModel):
    """The progress of the caller's oldest request."""

    progress: float = 0.0
    """0 to 1."""
    eta_relative: float = 0.0
    """Estimated seconds that are left."""
    state: ProgressState = ProgressState()
    current_image: str | None = None
    """The unfinished picture, in base64: the last one that was requested."""
    textinfo: str | None = None


def whole(body: WebuiRequest, translated: TranslatedRequest, pictures: list[Generated], maps: list[bytes]) -> bytes:
    """A `WebuiReply` of finished pictures, and of control maps behind them, as JSON.

    Base64 needs no escaping, so the pictures are joined to the JSON without a JSON encoder.
    """
    files = (*(picture.image.data for picture in pictures), *maps) if body.send_images else ()
    images = b",".join(b'"' + base64.b64encode(data) + b'"' for data in files)
    info = json.dumps(_info(body, translated, pictures), ensure_ascii=False)
    rest = json.dumps({"parameters": _echo(body), "info": info}).encode()
    return b'{"images":[' + images + b"]," + rest[1:]


def _echo(body: WebuiRequest) -> dict[str, Any]:
    """The request without its pictures, unless it wants them back."""
    kept = isinstance(body, Img2ImgRequest) and body.include_init_images
    pictures = {} if kept else {name: None for name in ("init_images", "mask") if name in type(body).model_fields}
    return body.model_dump(mode="json", exclude={"alwayson_scripts", *pictures}) | pictures | {"alwayson_scripts": {}}


def _info(body: WebuiRequest, translated: TranslatedRequest, pictures: list[Generated]) -> dict[str, Any]:
    params, plans = translated.params, [picture.plan for picture in pictures]
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
        "batch_size": translated.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": translated.model.name,
        "sd_model_hash": translated.model_hash,
        "sd_vae_name": translated.model.vae,
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
    """The progress of a caller's requests; without any, it is 0 of 0."""
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
