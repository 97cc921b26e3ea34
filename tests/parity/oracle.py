"""The oracle: diffusers' own pipelines on the same folders, set up by hand from the contract, not from our tables."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

TINY = Path(__file__).parents[2] / "models" / "tiny"

# contract.md's table, written down once more: class and the settings its name implies.
KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", KARRAS),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", KARRAS),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", KARRAS),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", KARRAS),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | KARRAS),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "DPM++ 2M SDE Heun Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"} | KARRAS,
    ),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM 2S": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM SDE": ("DPMSolverSDEScheduler", {}),
    "DPM SDE Karras": ("DPMSolverSDEScheduler", KARRAS),
    "DEIS 2M": ("DEISMultistepScheduler", {"solver_order": 2}),
    "UniPC 2M": ("UniPCMultistepScheduler", {"solver_order": 2}),
}

PIPELINES = {
    "SD1.5": ("sd15", StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "SD2": ("sd2", StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "SDXL1.0-base": ("sdxl", StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "SSD": ("ssd", StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "SDXL-turbo": ("sdxl-turbo", StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
}


@functools.cache
def pipeline(folder: str, pipeline_class: Any) -> Any:
    pipe = pipeline_class.from_pretrained(TINY / folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.default_scheduler_config = pipe.scheduler.config
    return pipe


def _scheduled(pipe: Any, sampler: str, seed: int) -> Any:
    name, settings = SCHEDULERS[sampler]
    if name == "DPMSolverSDEScheduler":
        settings = settings | {"noise_sampler_seed": seed}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.default_scheduler_config, **settings)
    return pipe


def draw(
    model_name: str,
    *,
    seed: int,
    steps: int,
    cfg_scale: float,
    sampler: str,
    width: int,
    height: int,
    image: bytes | None = None,
    strength: float | None = None,
    enable_refiner: bool = False,
    **prompts: Any,
) -> np.ndarray:
    """The picture diffusers makes of a request, `[height, width, 3]` uint8."""
    folder, text_class, image_class = PIPELINES[model_name]
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": steps, "guidance_scale": cfg_scale, "generator": generator} | prompts
    if image is None:
        pipe = pipeline(folder, text_class)
        arguments |= {"width": width, "height": height}
    else:
        pipe = pipeline(folder, image_class)
        picture = Image.open(io.BytesIO(image)).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        arguments |= {"image": picture, "strength": 0.8 if strength is None else strength}
    if enable_refiner:
        arguments |= {"denoising_end": 0.8, "output_type": "latent"}
    result = _scheduled(pipe, sampler, seed)(**arguments).images
    if enable_refiner:
        refiner = _scheduled(pipeline("sdxl-refiner", StableDiffusionXLImg2ImgPipeline), sampler, seed)
        result = refiner(
            image=result,
            denoising_start=0.8,
            num_inference_steps=steps,
            guidance_scale=cfg_scale,
            generator=generator,
            **prompts,
        ).images
    return np.asarray(result[0])
