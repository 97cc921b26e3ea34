"""Plans: complete, serialisable, and the same for the same request."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from config.catalog import Catalog
from deployments.api.schemas import RANDOM_SEED, GenerationRequest
from pipelines import plan
from pipelines.control_plan import ControlUse
from pipelines.errors import InvalidValueError, UnavailableModelError
from pipelines.plan import GenerationParams, GenerationPlan, LoraUse, PartWeights, ScheduleSlice
from pipelines.planning import REFINER_SHARE, PlanLimits, make_plan

HUB = Catalog.load("hub")
BASE = GenerationParams(model_name="SDXL1.0-base", prompt="a cat", seed=1)


def test_a_plan_survives_json() -> None:
    plan = make_plan(replace(BASE, enable_refiner=True, style_preset="Anime", negative_prompt="fog"), HUB)
    assert GenerationPlan.model_validate_json(plan.model_dump_json()) == plan


def test_the_wires_defaults() -> None:
    (stage,) = make_plan(GenerationParams(model_name="sd1.5", prompt="x"), HUB).stages
    assert (stage.width, stage.height, stage.schedule.steps, stage.guidance_scale) == (1024, 1024, 30, 5.0)
    assert stage.sampler == "DPM++ 2M SDE Heun Karras"
    assert stage.backend == "torch"


def test_the_refiner_is_the_second_stage() -> None:
    base, refiner = make_plan(replace(BASE, enable_refiner=True, negative_prompt="fog"), HUB).stages
    assert base.schedule == ScheduleSlice(steps=30, end=REFINER_SHARE)
    assert refiner.schedule == ScheduleSlice(steps=30, start=REFINER_SHARE)
    assert (base.component, refiner.component) == ("unet-sdxl-base", "refiner-sdxl")
    assert base.text.prompts == ("a cat", "a cat")
    assert refiner.text.encoders == (1,)
    assert refiner.text.negative_prompts == ("fog",)


def test_absent_and_empty_negative_prompts_differ() -> None:
    def negatives(**changes: str) -> tuple[str, ...] | None:
        return make_plan(replace(BASE, **changes), HUB).stages[0].text.negative_prompts

    assert negatives() is None
    assert negatives(negative_prompt="") == ("", "")
    assert negatives(negative_prompt="fog") == ("fog", "fog")
    assert negatives(negative_prompt="fog", negative_prompt_2="ink") == ("fog", "ink")
    assert negatives(negative_prompt_2="ink") == ("", "ink"), "a lone second one is not dropped"


def test_styles_wrap_the_prompt_and_add_their_negative() -> None:
    style = HUB.style("Film Noir")
    text = make_plan(replace(BASE, style_preset="film-noir", negative_prompt="fog", prompt_2="ink"), HUB).stages[0].text
    assert text.prompts == (style.prompt.replace("{prompt}", "a cat"), "ink")
    assert text.negative_prompts == (f"fog, {style.negative_prompt}", f"fog, {style.negative_prompt}")


def test_a_prompt_with_braces_is_only_text() -> None:
    text = make_plan(replace(BASE, prompt="{prompt} {0}", style_preset="base"), HUB).stages[0].text
    assert text.prompts[0] == "{prompt} {0}"


def test_random_seeds_differ() -> None:
    seeds = {make_plan(replace(BASE, seed=None), HUB).seed for _ in range(8)}
    assert len(seeds) == 8


def test_strength_counts_only_with_a_picture() -> None:
    assert make_plan(replace(BASE, strength=0.01), HUB).stages[0].schedule.strength is None
    assert make_plan(replace(BASE, image=b"x"), HUB).stages[0].schedule.strength == 0.8
    with pytest.raises(InvalidValueError, match=r"use at least 0\.0334"):
        make_plan(replace(BASE, image=b"x", strength=0.03), HUB)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 49, 333, 999])
def test_the_smallest_strength_that_is_named_works(steps: int) -> None:
    wanted = replace(BASE, image=b"x", steps=steps, sampler="Euler", width=512, height=512)
    with pytest.raises(InvalidValueError) as refused:
        make_plan(replace(wanted, strength=0.5 / steps), HUB)
    named = float(str(refused.value).rpartition(" ")[2])
    schedule = make_plan(replace(wanted, strength=named), HUB).stages[0].schedule
    assert schedule.strength is not None
    assert int(schedule.steps * schedule.strength) == 1


def test_the_budget_names_the_steps_it_allows() -> None:
    limits = PlanLimits(max_pixel_steps=1024 * 1024 * 20)
    with pytest.raises(InvalidValueError, match="allows 20 steps"):
        make_plan(BASE, HUB, limits)
    assert make_plan(replace(BASE, steps=20), HUB, limits)


@pytest.mark.parametrize("size", [(128, 2496), (2496, 136), (1032, 1000)])
def test_any_multiple_of_eight_is_a_size(size: tuple[int, int]) -> None:
    plan = make_plan(replace(BASE, width=size[0], height=size[1], steps=1), HUB)
    assert (plan.width, plan.height) == size


def test_an_edm_model_takes_the_edm_sampler_and_no_other() -> None:
    models = tuple(m.model_copy(update={"edm": m.name == "SSD"}) for m in HUB.models)
    catalog = HUB.model_copy(update={"models": models})
    params = replace(BASE, model_name="SSD")
    assert make_plan(replace(params, sampler="EDM_Euler"), catalog).stages[0].sampler == "EDM_Euler"
    with pytest.raises(InvalidValueError, match=r"Only \['EDM_Euler'\] allowed now"):
        make_plan(replace(params, sampler="Euler"), catalog)


def test_a_controlnet_steers_the_first_stage_alone() -> None:
    params = replace(BASE, model_name="SDXL-ControlNet", controlnet_name="Canny", controlnet_image=b"x")
    base, refiner = make_plan(replace(params, enable_refiner=True), HUB).stages
    assert base.controls == (ControlUse(name="canny", component="controlnet-sdxl-union", mode=3, preprocess=True),)
    assert refiner.controls == ()


def test_models_taken_out_of_service_answer_so() -> None:
    with pytest.raises(UnavailableModelError, match=r"not served by this graph. Only \['SD2'\] allowed now"):
        make_plan(BASE, HUB.only(("SD2",)))


WEIGHTS: list[tuple[float | PartWeights, dict[str, float], dict[str, float | None]]] = [
    (0.5, {"unet": 0.5, "text_encoder": 0.5, "text_encoder_2": 0.5}, {"weight": 0.5}),
    (
        PartWeights(unet=0.8, text_encoder=0.4),
        {"unet": 0.8, "text_encoder": 0.4, "text_encoder_2": 0.4},
        {"weight": 0.8, "text_encoder": 0.4},
    ),
    (
        PartWeights(unet=0.0, text_encoder_2=0.0),
        {"unet": 0.0, "text_encoder": 1.0, "text_encoder_2": 0.0},
        {"weight": 0.0, "text_encoder": 1.0, "text_encoder_2": 0.0},
    ),
    (PartWeights(), {"unet": 1.0, "text_encoder": 1.0, "text_encoder_2": 1.0}, {"weight": 1.0}),
]


@pytest.mark.parametrize(("given", "meant", "planned"), WEIGHTS)
def test_a_lora_has_a_weight_for_each_part(
    given: float | PartWeights, meant: dict[str, float], planned: dict[str, float | None]
) -> None:
    base = replace(BASE, model_name="SDXL1.0-base", loras={"Pixel_Art": given})
    (use,) = make_plan(base, HUB).stages[0].loras
    assert use == LoraUse.model_validate({"name": "Pixel_Art"} | planned)
    assert {part: use.weight_of(part) for part in meant} == meant
    asked = use.as_requested()
    again = PartWeights.model_validate(asked) if isinstance(asked, dict) else asked
    assert make_plan(replace(base, loras={"Pixel_Art": again}), HUB).stages[0].loras == (use,)


def test_a_part_that_a_model_lacks_gets_no_weight() -> None:
    loras = {"Pixel_Art": PartWeights(text_encoder_2=0.5)}
    with pytest.raises(InvalidValueError, match=r"text_encoder_2; SD1\.5 has one"):
        make_plan(replace(BASE, model_name="SD1.5", loras=loras), Catalog.load("tiny"))


def test_a_lora_whose_weights_are_all_0_is_none() -> None:
    none = {"Pixel_Art": PartWeights(unet=0, text_encoder=0)}
    assert make_plan(replace(BASE, model_name="SDXL1.0-base", loras=none), HUB).stages[0].loras == ()


def test_a_tag_has_a_weight_for_the_texts_and_one_for_the_unet() -> None:
    params = replace(BASE, model_name="SDXL1.0-base", prompt="x <lora:Pixel_Art:0.2:0.6>", prompt_syntax="weighted")
    (use,) = make_plan(params, HUB).stages[0].loras
    assert use == LoraUse(name="Pixel_Art", weight=0.6, text_encoder=0.2)


def test_loras_are_resolved_checked_and_kept_from_the_refiner() -> None:
    base, refiner = make_plan(replace(BASE, enable_refiner=True, loras={"pixel_art": 0.5}), HUB).stages
    assert base.loras == (LoraUse(name="Pixel_Art", weight=0.5),)
    assert refiner.loras == ()
    assert make_plan(replace(BASE, loras={"Pixel_Art": 0.0}), HUB).stages[0].loras == ()
    for name, reason in {"Logo": "pin a revision", "Superhero": "no public weights"}.items():
        with pytest.raises(InvalidValueError, match=rf"{reason}.*Only \['Pixel_Art'\] allowed now"):
            make_plan(replace(BASE, loras={name: 1.0}), HUB)
    with pytest.raises(InvalidValueError, match="given twice"):
        make_plan(replace(BASE, loras={"Pixel_Art": 1.0, "pixel_art": 1.0}), HUB)


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("steps", plan.MIN_STEPS, plan.MAX_STEPS),
        ("cfg_scale", plan.MIN_CFG_SCALE, plan.MAX_CFG_SCALE),
        ("strength", plan.MIN_STRENGTH, plan.MAX_STRENGTH),
        ("seed", 0, plan.SEED_LIMIT - 1),
        ("width", plan.MIN_SIDE, plan.MAX_SIDE),
        ("height", plan.MIN_SIDE, plan.MAX_SIDE),
    ],
)
def test_planning_and_the_api_have_the_same_bounds(field: str, low: int, high: int) -> None:
    for value in (low - 1, high + 1):
        with pytest.raises(InvalidValueError, match=f"{field} {value} is out of range: {low} to {high}"):
            make_plan(replace(BASE, **{field: value}), HUB)
        if (field, value) == ("seed", RANDOM_SEED):  # the API's word for no seed
            continue
        with pytest.raises(ValidationError):
            GenerationRequest.model_validate({"model_name": "SD1.5", "prompt": "x", field: value})
    for value in (low, high):
        assert GenerationRequest.model_validate({"model_name": "SD1.5", "prompt": "x", field: value})
