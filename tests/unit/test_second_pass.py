"""What is decided of a second pass: its size, its steps, what it costs, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from config.catalog import Catalog
from config.upscalers import A1111_NAMES, LATENT_METHODS, PICTURE_METHODS
from deployments.api.info import repeating
from deployments.api.schemas import GenerationRequest
from pipelines.enlargement import Enlargement, HiresParams
from pipelines.errors import InvalidValueError
from pipelines.pictures.infotext import infotext, parse_infotext, request_fields
from pipelines.plan import CompiledSize, GenerationParams, GenerationPlan
from pipelines.planning import PlanLimits, make_plan
from pipelines.sampling.latents import Latents

HUB = Catalog.load("hub")
BASE = GenerationParams(model_name="SDXL1.0-base", prompt="a cat", seed=1, width=1024, height=768, steps=30)


def plan_of(hires: dict[str, Any] | None = None, **changes: Any) -> GenerationPlan:
    return make_plan(replace(BASE, hires=HiresParams(**hires or {}), **changes), HUB)


def test_the_defaults_are_a1111s() -> None:
    plan = plan_of()
    first, second = plan.stages
    assert (first.width, first.height, first.schedule.steps, first.enlargement) == (1024, 768, 30, None)
    assert (second.width, second.height, second.component) == (2048, 1536, first.component)
    assert (second.schedule.strength, second.schedule.steps_run) == (0.7, 30)
    assert second.enlargement == Enlargement(upscaler="latent", scale=2.0)
    assert (plan.width, plan.height, plan.size) == (1024, 768, (2048, 1536))
    assert plan.pixel_steps == 30 * 1024 * 768 + 30 * 2048 * 1536
    assert GenerationPlan.model_validate_json(plan.model_dump_json()) == plan


def test_sides_are_rounded_down_to_what_the_model_takes() -> None:
    assert plan_of({"scale": 1.55}, width=512, height=520).size == (792, 800)


def test_the_refiner_draws_in_the_second_pass() -> None:
    first, second, refiner = plan_of(enable_refiner=True).stages
    assert (first.schedule.end, second.schedule.end, refiner.schedule.start) == (None, 0.8, 0.8)
    assert (refiner.width, refiner.height, refiner.component) == (2048, 1536, "refiner-sdxl")
    assert second.schedule.steps == refiner.schedule.steps
    assert refiner.enlargement is None


@given(steps=st.integers(1, 1000), strength=st.floats(0.01, 1))
def test_as_many_steps_run_as_were_asked_for(steps: int, strength: float) -> None:
    hires, small = {"steps": steps, "strength": strength, "scale": 1}, {"width": 128, "height": 128}
    if steps / strength > 999:
        with pytest.raises(InvalidValueError, match="needs a schedule of"):
            plan_of(hires, sampler="Euler a", **small)
    else:
        _, second = plan_of(hires, sampler="Euler a", **small).stages
        assert second.schedule.steps_run == steps
        assert int((second.schedule.steps - 1) * strength) < steps, "the shortest such schedule"


def test_tvm_is_asked_of_the_first_pass_and_taken_by_the_second_where_it_can() -> None:
    model = HUB.model("SDXL1.0-base")
    small = next(size for size in model.tvm_sizes)
    compiled = [CompiledSize(model.unet, small.width, small.height, False, 3.0)]
    params = replace(
        BASE, width=small.width, height=small.height, backend="tvm", hires=HiresParams(scale=2, strength=0.5)
    )
    assert [stage.backend for stage in make_plan(params, HUB, None, compiled).stages] == ["tvm", "torch"]
    same = replace(params, hires=HiresParams(scale=1, strength=0.5))
    assert [stage.backend for stage in make_plan(same, HUB, None, compiled).stages] == ["tvm", "tvm"]


@pytest.mark.parametrize(
    ("hires", "changes", "message"),
    [
        ({"scale": 3}, {}, "makes 3072x2304 of 1024x768, and a side has at most 2496 pixels: use at most 2.43"),
        ({"steps": 100, "strength": 0.05}, {}, "needs a schedule of 2000 steps"),
        ({"steps": 1, "strength": 5e-324}, {}, "needs a schedule of inf steps"),
        ({"upscaler": "4x-Magic"}, {}, r"Unexpected hires.upscaler '4x-Magic'. Only \['latent', .*'lanczos'"),
        ({"strength": 0.2}, {"enable_refiner": True}, "use more than 0.2, or leave enable_refiner out"),
        ({}, {"image": b"x", "mask_image": b"x"}, "cannot be used with mask_image"),
        ({"scale": 2.4, "steps": 900, "strength": 1.0}, {"sampler": "Euler a"}, "900 steps at 2456x1840 after 30"),
    ],
)
def test_second_passes_that_are_impossible_are_refused(
    hires: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message) as caught:
        plan_of(hires, **changes)
    assert caught.value.param == "hires"


def test_the_budget_is_of_both_passes() -> None:
    params = replace(BASE, hires=HiresParams(scale=1, steps=10))
    make_plan(params, HUB, PlanLimits(40 * 1024 * 768))
    with pytest.raises(InvalidValueError, match="10 steps at 1024x768 after 30 at 1024x768 are over"):
        make_plan(params, HUB, PlanLimits(40 * 1024 * 768 - 1))


@pytest.mark.parametrize("wrong", [{"scale": 0.5}, {"scale": 9}, {"steps": 0}, {"strength": 0}, {"strength": 1.1}])
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Input should be"):
        HiresParams(**wrong)


def test_unset_fields() -> None:
    body = {"model_name": "SD1.5", "prompt": "x", "hires": {"steps": None, "upscaler": "", "scale": None}}
    assert GenerationRequest.model_validate(body).to_params().hires == HiresParams()


@pytest.mark.parametrize("upscaler", [*LATENT_METHODS, *PICTURE_METHODS])
def test_a_request_comes_back_from_its_plan_and_from_its_infotext(upscaler: str) -> None:
    plan = plan_of({"scale": 1.5, "steps": 12, "strength": 0.45, "upscaler": A1111_NAMES[upscaler].upper()})
    wanted = {"scale": 1.5, "steps": 12, "strength": 0.45, "upscaler": upscaler}
    fields, needs = repeating(plan)
    assert (fields["hires"], needs) == (wanted, [])
    assert "enable_refiner" not in fields
    again = make_plan(GenerationRequest.model_validate(fields).to_params(), HUB)
    assert again == plan.model_copy(update={"output_quality": again.output_quality})
    text = infotext(plan)
    told = f"Denoising strength: 0.45, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: {A1111_NAMES[upscaler]}"
    assert told in text
    assert "Size: 1024x768" in text
    told_fields = request_fields(*(parse_infotext(text) or ("", None, {})))
    assert told_fields["hires"] == wanted
    assert "strength" not in told_fields


def test_an_infotext_of_a1111_without_steps_of_its_own() -> None:
    pairs = {"Steps": "20", "Denoising strength": "0.5", "Hires upscale": "2", "Hires upscaler": "R-ESRGAN 4x+"}
    assert request_fields("x", None, pairs)["hires"] == {"scale": 2.0, "strength": 0.5, "upscaler": "R-ESRGAN 4x+"}
    assert "hires" not in request_fields("x", None, pairs | {"Hires upscale": "99"})
    assert "strength" not in request_fields("x", None, pairs | {"Hires upscale": "99"})


def test_a_refiner_after_a_second_pass_is_told() -> None:
    plan = plan_of(enable_refiner=True)
    assert repeating(plan)[0]["enable_refiner"] is True
    assert "Refiner: refiner-sdxl, Refiner switch at: 0.8" in infotext(plan)


def test_a_model_for_inpainting_has_none(inpainting_catalog: Catalog) -> None:
    params = GenerationParams(model_name="SD1.5-inpainting", prompt="a fox", hires=HiresParams())
    with pytest.raises(InvalidValueError, match="hires is not possible with SD1") as caught:
        make_plan(params, inpainting_catalog)
    assert caught.value.param == "hires"


@pytest.mark.parametrize("method", LATENT_METHODS)
def test_every_interpolation_of_latents(method: str) -> None:
    """And whatever the first pass drew from its generator, the second begins anew."""
    values = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    larger = Latents(values, torch.Generator().get_state()).enlarged(method, (1, 4, 9, 10))
    mode, antialias = LATENT_METHODS[method]
    expected = torch.nn.functional.interpolate(values, (9, 10), mode=mode, antialias=antialias)
    assert torch.equal(larger.values, expected)
    assert larger.generator_state is None
