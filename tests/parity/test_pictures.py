"""sdgraph's picture equals diffusers' within 1/255: alone, and in a batch with other jobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.plan import GenerationParams
from pipelines.sampling.samplers import SAMPLERS
from pipelines.text2image import Text2Image
from tests.parity import oracle

OWN_SAMPLERS: set[str] = set()
"""Names whose solver diffusers does not have; each has a test of its own elsewhere."""
SIZE = {"SD1.5": 128, "SD2": 128, "SDXL1.0-base": 256, "SSD": 256, "SDXL-turbo": 256}


def request(model: str, **changes: Any) -> dict[str, Any]:
    """A full request; every field a test may vary."""
    base = {
        "prompt": "a red fox in the snow",
        "seed": 1234,
        "steps": 5,
        "cfg_scale": 5.0,
        "sampler": "DPM++ 2M SDE Heun Karras",
        "width": SIZE[model],
        "height": SIZE[model],
    }
    return {"model_name": model} | base | changes


def assert_same(picture: Image.Image, expected: np.ndarray) -> None:
    ours = np.asarray(picture).astype(int)
    assert ours.shape == expected.shape
    assert ours.std() > 10, "a flat picture proves nothing"
    assert np.abs(ours - expected).max() <= 1


def check(text2image: Text2Image, **fields: Any) -> np.ndarray:
    """Draw a request on both sides and compare; returns the oracle's picture."""
    expected = oracle.draw(**fields)
    assert_same(text2image.generate(GenerationParams(**fields)).image, expected)
    return expected


@pytest.mark.parametrize("sampler", sorted(oracle.SCHEDULERS))
@pytest.mark.parametrize("model", ["SD1.5", "SD2", "SDXL1.0-base"])
def test_sampler(text2image: Text2Image, model: str, sampler: str) -> None:
    check(text2image, **request(model, sampler=sampler))


def test_the_oracle_knows_every_sampler_that_serves_these_models() -> None:
    served = {name for name, spec in SAMPLERS.items() if not spec.edm}
    assert served - OWN_SAMPLERS == set(oracle.SCHEDULERS)


@pytest.mark.parametrize("model", sorted(SIZE))
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 5.0])
def test_guidance(text2image: Text2Image, model: str, cfg_scale: float) -> None:
    check(text2image, **request(model, cfg_scale=cfg_scale, sampler="Euler a"))


@pytest.mark.parametrize("model", sorted(SIZE))
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image(text2image: Text2Image, photo: bytes, model: str, strength: float) -> None:
    check(text2image, **request(model, image=photo, strength=strength, steps=7))


@pytest.mark.parametrize("sampler", sorted(oracle.SCHEDULERS))
@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_sampler_beginning_midway(text2image: Text2Image, photo: bytes, model: str, sampler: str) -> None:
    check(text2image, **request(model, image=photo, strength=0.6, steps=6, sampler=sampler))


@pytest.mark.parametrize(
    "sampler", ["DPM++ 2M SDE Heun Karras", "Euler", "Euler a", "Heun", "DDIM", "DPM SDE", "DPM2 a"]
)
@pytest.mark.parametrize("model", ["SDXL1.0-base", "SSD"])
def test_refiner(text2image: Text2Image, model: str, sampler: str) -> None:
    check(text2image, **request(model, enable_refiner=True, steps=10, sampler=sampler))


def test_refiner_after_image_to_image(text2image: Text2Image, photo: bytes) -> None:
    check(text2image, **request("SDXL1.0-base", enable_refiner=True, steps=10, image=photo, strength=0.7))


@pytest.mark.parametrize("sampler", ["DPM++ 2M SDE Heun Karras", "Euler", "Heun", "DDIM"])
@pytest.mark.parametrize("strength", [0.1, 0.2, 0.3])
def test_refiner_after_a_base_that_has_nothing_left_to_do(
    text2image: Text2Image, photo: bytes, strength: float, sampler: str
) -> None:
    fields = request("SDXL1.0-base", enable_refiner=True, steps=10, image=photo, strength=strength, sampler=sampler)
    check(text2image, **fields)


def test_refiner_reads_the_negative_prompt(text2image: Text2Image) -> None:
    check(text2image, **request("SDXL1.0-base", enable_refiner=True, steps=10, negative_prompt="ugly"))


def test_refiner_of_three_steps_on_a_second_order_sampler(text2image: Text2Image) -> None:
    check(text2image, **request("SDXL1.0-base", enable_refiner=True, steps=3, sampler="Heun"))


@pytest.mark.parametrize("model", ["SD1.5", "SD2", "SDXL1.0-base"])
@pytest.mark.parametrize("negative", ["", "blurry, low quality"])
def test_negative_prompt(text2image: Text2Image, model: str, negative: str) -> None:
    """An empty negative prompt is not an absent one: SDXL base zeroes the embeddings only of the latter."""
    given = check(text2image, **request(model, negative_prompt=negative))
    absent = check(text2image, **request(model))
    assert np.array_equal(given, absent) == (negative == "" and model != "SDXL1.0-base")


def test_prompt_pairs(text2image: Text2Image) -> None:
    plain = check(text2image, **request("SDXL1.0-base"))
    paired = check(text2image, **request("SDXL1.0-base", prompt_2="oil painting"))
    assert not np.array_equal(plain, paired)
    check(
        text2image,
        **request("SDXL1.0-base", prompt_2="oil painting", negative_prompt="blurry", negative_prompt_2="text"),
    )


def test_long_prompts_are_cut_where_clip_ends(text2image: Text2Image) -> None:
    for model in ("SD1.5", "SDXL1.0-base"):
        long = GenerationParams(**request(model, prompt="a very long tale " * 60), long_prompt="cut")
        assert_same(text2image.generate(long).image, oracle.draw(**request(model, prompt="a very long tale " * 60)))


@pytest.mark.parametrize(
    ("model", "width", "height"), [("SD1.5", 136, 200), ("SD2", 272, 144), ("SDXL1.0-base", 416, 160)]
)
def test_pictures_with_unequal_sides_equal_the_oracles(
    text2image: Text2Image, photo: bytes, model: str, width: int, height: int
) -> None:
    check(text2image, **request(model, width=width, height=height))
    check(text2image, **request(model, width=width, height=height, image=photo, strength=0.5))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sampler", sorted(oracle.SCHEDULERS))
def test_few_steps(text2image: Text2Image, sampler: str, steps: int) -> None:
    """At 1 to 4 steps solvers have little history; diffusers draws a picture all the same, and so do we."""
    fields = request("SD1.5", sampler=sampler, steps=steps)
    expected = oracle.draw(**fields)
    picture = np.asarray(text2image.generate(GenerationParams(**fields)).image).astype(int)
    assert np.abs(picture - expected).max() <= 1


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_jobs_of_different_samplers_steps_and_guidance_share_ticks(text2image: Text2Image, model: str) -> None:
    requests = [
        request(model, sampler="Euler a", steps=4, cfg_scale=7.5, seed=1),
        request(model, sampler="Heun", steps=6, cfg_scale=1.0, seed=2, prompt="a boat"),
        request(model, sampler="DPM++ 2M SDE Karras", steps=9, cfg_scale=3.0, seed=3, negative_prompt="fog"),
        request(model, sampler="DPM SDE", steps=3, cfg_scale=0.0, seed=4),
    ]
    together = text2image.generate_many([GenerationParams(**fields) for fields in requests])
    for picture, fields in zip(together, requests, strict=True):
        assert_same(picture.image, oracle.draw(**fields))
