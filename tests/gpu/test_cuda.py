"""Parity on a CUDA device. Everything else in the suite runs without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from config.catalog import Catalog
from pipelines.engine.batching import BatchKey
from pipelines.engine.memory import USABLE, row_bytes
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity.oracle import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODELS = {"SD1.5": ("sd15", StableDiffusionPipeline, 128), "SDXL1.0-base": ("sdxl", StableDiffusionXLPipeline, 256)}


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds float32 convolutions to TF32 by default, and not the same way for every number of rows."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_alone_and_in_a_batch(catalog: Catalog, model: str, dtype: str) -> None:
    """The catalog's number format holds on the GPU; half precision may differ by a few steps of 255 in a batch."""
    data = catalog.model_dump()
    for component in data["components"]:
        component["dtype"] = dtype
    folder, pipeline_class, side = MODELS[model]
    pipe = pipeline_class.from_pretrained(TINY / folder, dtype=getattr(torch, dtype)).to("cuda")
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    fields: dict[str, Any] = {"width": side, "height": side, "steps": 5, "sampler": "Euler a", "cfg_scale": 5.0}
    requests = [GenerationParams(model_name=model, prompt="a fox", seed=seed, **fields) for seed in range(3)]
    together = Text2Image(Catalog.model_validate(data), device="cuda").generate_many(requests)
    for seed, picture in enumerate(together):
        generator = torch.Generator().manual_seed(seed)
        size = {"width": side, "height": side}
        expected = pipe("a fox", num_inference_steps=5, guidance_scale=5.0, generator=generator, **size).images[0]
        difference = np.abs(np.asarray(picture.image).astype(int) - np.asarray(expected))
        assert difference.max() <= (1 if dtype == "float32" else 8)


def test_a_row_takes_no_more_than_is_set_aside_for_it() -> None:
    """Counted on the meta device against the allocator's own peak; work spaces must fit into what USABLE leaves."""
    unet = UNet2DConditionModel.from_pretrained(TINY / "sd15", subfolder="unet").to("cuda").eval()
    key = BatchKey((4, 128, 128), (77, 32))
    sample, context = (torch.zeros(8, *shape, device="cuda") for shape in key)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        unet(sample, torch.zeros(8, device="cuda"), context)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 8 * row_bytes(unet.config, torch.float32, key) / USABLE
