"""Rescaled guidance, a guidance window and eta draw what diffusers draws, alone and in a batch of eight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from config.catalog import Catalog
from pipelines.engine.guidance import Guidance
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.text2image import Text2Image
from tests.parity import oracle

SIZE = {"SD1.5": 128, "SD2": 128, "SDXL1.0-base": 256}
WINDOWS = [(0.0, 0.5), (0.3, 1.0), (0.25, 0.7)]


def fields(model: str, **changes: Any) -> dict[str, Any]:
    base = {"prompt": "a fox", "seed": 3, "steps": 6, "cfg_scale": 6.0, "sampler": "Euler a"}
    return {"model_name": model, "width": SIZE[model], "height": SIZE[model]} | base | changes


def expected(**request: Any) -> np.ndarray:
    """diffusers' picture; the window, which its pipelines do not have, by a UNet that forgets the uncond row."""
    window = (request.pop("guidance_start", 0.0), request.pop("guidance_end", 1.0))
    folder, pipeline_class, _ = oracle.PIPELINES[request["model_name"]]
    with unguided_outside(oracle.pipeline(folder, pipeline_class).unet, *window):
        return oracle.draw(**request)


@contextmanager
def unguided_outside(unet: Any, start: float, end: float) -> Iterator[None]:
    """Within the block, the cond row's output stands for both at timesteps outside of the window."""
    forward = type(unet).forward

    def windowed(sample: Any, timestep: Any, *arguments: Any, **named: Any) -> Any:
        (output, *_) = forward(unet, sample, timestep, *arguments, **named)
        if not 1000 * (1 - end) <= float(timestep) <= 1000 * (1 - start):
            output = output.clone()
            output[0] = output[-1]
        return (output,)

    unet.forward = windowed
    try:
        yield
    finally:
        del unet.forward


def distance(ours: Any, theirs: np.ndarray) -> int:
    pixels = np.asarray(ours).astype(int)
    assert pixels.std() > 10, "a flat picture proves nothing"
    return int(np.abs(pixels - theirs).max())


def check(text2image: Text2Image, **request: Any) -> None:
    """The same as diffusers', and not what the request without its last fields would be."""
    names = {"guidance_rescale", "guidance_start", "guidance_end", "eta"}
    picture = text2image.generate(GenerationParams(**request)).image
    assert distance(picture, expected(**request)) <= 1
    usual = text2image.generate(GenerationParams(**{k: v for k, v in request.items() if k not in names})).image
    assert distance(usual, np.asarray(picture)) > 1


@pytest.mark.parametrize("rescale", [0.3, 1.0])
@pytest.mark.parametrize("model", sorted(SIZE))
def test_rescaled_guidance(text2image: Text2Image, model: str, rescale: float) -> None:
    check(text2image, **fields(model, guidance_rescale=rescale))


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("model", sorted(SIZE))
def test_eta(text2image: Text2Image, model: str, eta: float) -> None:
    check(text2image, **fields(model, sampler="DDIM", eta=eta))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("model", sorted(SIZE))
def test_a_window_of_guidance(text2image: Text2Image, model: str, window: tuple[float, float]) -> None:
    check(text2image, **fields(model, guidance_start=window[0], guidance_end=window[1]))


@pytest.mark.parametrize("steps", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_a_sampler_without_a_table_rescales_and_has_a_window(text2image: Text2Image, steps: int) -> None:
    """A schedule of 300 ticks has no table."""
    how = {"guidance_rescale": 0.5, "guidance_end": 0.9, "eta": 0.3}
    check(text2image, **fields("SD1.5", sampler="DDIM", steps=steps, width=64 * 2, **how))


def test_eight_jobs_guided_in_eight_ways_share_ticks(text2image: Text2Image) -> None:
    requests = [
        fields("SDXL1.0-base", seed=1),
        fields("SDXL1.0-base", seed=2, guidance_rescale=0.7),
        fields("SDXL1.0-base", seed=3, guidance_end=0.5, sampler="DPM++ 2M Karras"),
        fields("SDXL1.0-base", seed=4, sampler="DDIM", eta=0.8),
        fields("SDXL1.0-base", seed=5, cfg_scale=1.0),
        fields("SDXL1.0-base", seed=6, guidance_start=0.3, guidance_rescale=1.0, negative_prompt="fog"),
        fields("SDXL1.0-base", seed=7, sampler="Euler", guidance_start=0.2, guidance_end=0.8, steps=9),
        fields("SDXL1.0-base", seed=8, sampler="DDIM", eta=1.0, guidance_rescale=0.4, guidance_end=0.6),
    ]
    together = text2image.generate_many([GenerationParams(**request) for request in requests])
    for picture, request in zip(together, requests, strict=True):
        assert distance(picture.image, expected(**request)) <= 1


def test_a_tick_outside_the_window_takes_one_row(text2image: Text2Image, catalog: Catalog) -> None:
    plan = make_plan(GenerationParams(**fields("SD1.5", sampler="Euler", steps=10, guidance_end=0.5)), catalog)
    (stage,) = plan.stages
    engine = text2image.torch_engine(stage.component)
    job = engine.add(engine.prepare("one", stage, text2image.text_encoders(plan.text_encoder).encode(stage), None))
    assert job.outstanding_work == 15 * 128 * 128
    rows = []
    while len(engine):
        rows.append(engine.tick().rows)
    assert rows == [2] * 5 + [1] * 5


def test_both_ticks_of_a_step_follow_the_first(catalog: Catalog) -> None:
    (stage,) = make_plan(GenerationParams(**fields("SD1.5", guidance_start=0.3, guidance_end=0.6)), catalog).stages
    guidance = Guidance.create(stage, [999.0, 710.0, 700.0, 550.0, 401.0, 399.0, 100.0], order=2, trained=1000)
    assert guidance.ticks == (False, False, True, True, True, True, False)
