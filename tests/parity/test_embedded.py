"""The shipped models in the graph's engine and in diffusers' own pipelines: the same picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from config.catalog import ROOT, Catalog
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity.test_pictures import assert_same

PIPELINES: dict[str, tuple[str, Any, int]] = {
    "SD1.5": ("sd15", StableDiffusionPipeline, 512),
    "SD2": ("sd15", StableDiffusionPipeline, 512),
    "SDXL1.0-base": ("sdxl", StableDiffusionXLPipeline, 1024),
}


@pytest.mark.parametrize("model", PIPELINES)
def test_shipped_weights_draw_what_diffusers_draws(model: str) -> None:
    folder, pipeline_class, side = PIPELINES[model]
    params = GenerationParams(model_name=model, prompt="a cat in the snow", seed=3, steps=8)
    ours = Text2Image(Catalog.load("embedded")).generate(params).image
    pipe = pipeline_class.from_pretrained(ROOT / "models" / folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", solver_type="heun", use_karras_sigmas=True
    )
    arguments = {"num_inference_steps": 8, "guidance_scale": 5.0, "width": side, "height": side}
    theirs = pipe("a cat in the snow", generator=torch.Generator().manual_seed(3), **arguments).images[0]
    assert_same(ours, np.asarray(theirs))
