"""GenerationParams -> GenerationPlan: every decision about a picture, made before any tensor exists."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from config.catalog import Catalog, ModelSpec
from config.choices import Choices, UnknownChoiceError
from pipelines.backend_choice import BACKENDS, BackendChoice
from pipelines.controls import controls_of
from pipelines.enlargement import Enlargement
from pipelines.errors import InvalidValueError, UnavailableModelError
from pipelines.mixtures import mixture_of
from pipelines.plan import (
    MAX_CFG_SCALE,
    MAX_CLIP_SKIP,
    MAX_ETA,
    MAX_GUIDANCE_RESCALE,
    MAX_INPAINT_PADDING,
    MAX_MASK_BLUR,
    MAX_SIDE,
    MAX_STEPS,
    MAX_STRENGTH,
    MIN_CFG_SCALE,
    MIN_CLIP_SKIP,
    MIN_ETA,
    MIN_GUIDANCE_RESCALE,
    MIN_SIDE,
    MIN_STEPS,
    MIN_STRENGTH,
    OUTPUT_QUALITY,
    REFINER_SHARE,
    SEED_LIMIT,
    CompiledSize,
    Emphasis,
    GenerationParams,
    GenerationPlan,
    InpaintArea,
    InpaintFill,
    InpaintPlan,
    LongPrompt,
    PromptSyntax,
    ScheduleSlice,
    StagePlan,
    TextReading,
)
from pipelines.sampling.samplers import SAMPLER_CHOICES, check_sampler
from pipelines.second_pass import SecondPass
from pipelines.text.embedding_names import with_embeddings
from pipelines.text.prompts import Prompts


@dataclass(frozen=True)
class PlanLimits:
    """What a server allows one request."""

    max_pixel_steps: int = 100 * 2048 * 2048


def make_plan(
    params: GenerationParams,
    catalog: Catalog,
    limits: PlanLimits | None = None,
    compiled: Collection[CompiledSize] = (),
) -> GenerationPlan:
    """Validate `params` against the catalog and decide every open question; `compiled` is what backend tvm can run.

    Raises:
        UnavailableModelError: unknown or unserved model.
        InvalidValueError: any other value this model cannot take; the message names the allowed ones.
    """
    model = _model(params.model_name, catalog)
    defaults = model.defaults
    width = params.width if params.width is not None else defaults.width
    height = params.height if params.height is not None else defaults.height
    steps = params.steps if params.steps is not None else defaults.steps
    guidance = params.cfg_scale if params.cfg_scale is not None else defaults.cfg_scale
    sampler = _choose(SAMPLER_CHOICES, params.sampler if params.sampler is not None else defaults.sampler)
    _check_size(width, height, model)
    _check_range("steps", steps, MIN_STEPS, MAX_STEPS)
    _check_range("cfg_scale", guidance, MIN_CFG_SCALE, MAX_CFG_SCALE)
    _check_range("eta", params.eta, MIN_ETA, MAX_ETA)
    check_sampler(sampler, steps, model.edm, params.eta)
    _check_guidance(params, model)
    _check_family(params, model)
    controls = controls_of(params, model, catalog)
    strength = _strength(params, model, steps)
    inpaint = _inpaint(params)
    seed = params.seed if params.seed is not None else secrets.randbelow(SEED_LIMIT)
    _check_range("seed", seed, 0, SEED_LIMIT - 1)
    backend = BackendChoice.create(_choose(BACKENDS, params.backend), model, width, height, compiled)
    second = SecondPass.create(params, steps, sampler, backend, catalog)
    if second is not None and catalog.component(model.unet).inpainting:
        raise InvalidValueError(
            f"hires is not possible with {model.name}, a model for inpainting: leave it out, or use another model",
            "hires",
        )
    _check_budget(width, height, steps, second, limits or PlanLimits())
    style = catalog.style(_choose(catalog.style_choices(), params.style_preset)) if params.style_preset else None
    prompts = with_embeddings(Prompts.create(params, style, _reading(params, model)), model, catalog)
    loras = mixture_of(params, prompts.lora_tags, model, catalog)

    def stage(
        component_id: str, schedule: ScheduleSlice, backend: BackendChoice, enlargement: Enlargement | None = None
    ) -> StagePlan:
        own = component_id == model.unet  # the refiner takes neither LoRAs nor ControlNets
        steered = own and bool(controls)
        name = backend.for_stage(component_id, steered, own and bool(loras))
        return StagePlan(
            component=component_id,
            backend=name,
            precision=backend.precision(component_id, steered) if name == "tvm" else None,
            sampler=sampler,
            schedule=schedule,
            guidance_scale=guidance,
            guidance_rescale=params.guidance_rescale,
            guidance_start=params.guidance_start,
            guidance_end=params.guidance_end,
            text=prompts.plan(catalog.component(component_id)),
            width=backend.width,
            height=backend.height,
            seed=seed,
            loras=loras if own else (),
            controls=controls if own else (),
            inpaint=inpaint,
            enlargement=enlargement,
            reads_mask=catalog.component(component_id).inpainting,
        )

    def last_pass(
        part: ScheduleSlice, backend: BackendChoice, enlargement: Enlargement | None = None
    ) -> tuple[StagePlan, ...]:
        if not params.enable_refiner or model.refiner is None:
            return (stage(model.unet, part, backend, enlargement),)
        rest = ScheduleSlice(steps=part.steps, start=REFINER_SHARE, eta=part.eta)
        part = part.model_copy(update={"end": REFINER_SHARE})
        return stage(model.unet, part, backend, enlargement), stage(model.refiner, rest, backend)

    first = ScheduleSlice(steps=steps, strength=strength, eta=params.eta)
    if second is None:
        stages = last_pass(first, backend)
    else:
        stages = (stage(model.unet, first, backend), *last_pass(second.schedule, second.backend, second.enlargement))
    return GenerationPlan(
        model=model.name,
        seed=seed,
        width=width,
        height=height,
        text_encoder=model.text_encoder,
        vae=model.vae,
        stages=stages,
        output_format=params.output_format,
        output_quality=_quality(params),
    )


def _quality(params: GenerationParams) -> int:
    """Of the file; PNG loses nothing, so that it knows no other than 100."""
    if params.output_quality is None:
        return OUTPUT_QUALITY
    _check_range("output_compression", params.output_quality, 0, 100)
    if params.output_format == "png" and params.output_quality != 100:
        raise InvalidValueError(
            f"output_compression {params.output_quality} is not possible with output_format 'png', which loses "
            f"nothing. Leave it out, or send output_format 'jpeg' or 'webp'",
            "output_compression",
        )
    return params.output_quality


def _choose(choices: Choices, value: str) -> str:
    try:
        return choices.resolve(value)
    except UnknownChoiceError as error:
        raise InvalidValueError(str(error), error.field) from None


def _model(name: str, catalog: Catalog) -> ModelSpec:
    served = [m.name for m in catalog.available_models()]
    try:
        model = catalog.model(catalog.model_choices().resolve(name))
    except UnknownChoiceError as error:
        message = str(UnknownChoiceError(error.field, error.value, served, error.suggestion))
        if (reason := catalog.why_unserved(name)) is not None:
            message = f"model_name '{name.strip()[:100]}' is not available: {reason}. Only {served} allowed now"
        raise UnavailableModelError(message, "model_name") from None
    if model.unavailable is not None:
        raise UnavailableModelError(
            f"model_name '{model.name}' is not available: {model.unavailable}. Only {served} allowed now", "model_name"
        )
    return model


def _check_range(param: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidValueError(f"{param} {value} is out of range: {low} to {high}", param)


def _check_size(width: int, height: int, model: ModelSpec) -> None:
    for param, value in (("width", width), ("height", height)):
        _check_range(param, value, MIN_SIDE, MAX_SIDE)
        if value % model.size_multiple:
            below = value // model.size_multiple * model.size_multiple
            nearest = [v for v in (below, below + model.size_multiple) if MIN_SIDE <= v <= MAX_SIDE]
            raise InvalidValueError(
                f"{param} {value} is not a multiple of {model.size_multiple}, which {model.name} needs; "
                f"the nearest valid values are {nearest}",
                param,
            )


def _check_budget(width: int, height: int, steps: int, second: SecondPass | None, limits: PlanLimits) -> None:
    left = limits.max_pixel_steps - (second.pixel_steps if second else 0)
    if second is not None and width * height * steps > left:
        raise InvalidValueError(
            f"hires: {second.schedule.steps_run} steps at {second.backend.width}x{second.backend.height} after {steps} "
            f"at {width}x{height} are over this server's budget of {limits.max_pixel_steps} pixels x steps. Use a "
            "smaller hires.scale or fewer hires.steps",
            "hires",
        )
    if width * height * steps > left:
        most = left // (width * height)
        raise InvalidValueError(
            f"steps {steps} at {width}x{height} is over this server's budget; at this size it allows {most} steps",
            "steps",
        )


def _check_guidance(params: GenerationParams, model: ModelSpec) -> None:
    _check_range("guidance_rescale", params.guidance_rescale, MIN_GUIDANCE_RESCALE, MAX_GUIDANCE_RESCALE)
    _check_range("guidance_start", params.guidance_start, 0, 1)
    _check_range("guidance_end", params.guidance_end, 0, 1)
    if params.guidance_start >= params.guidance_end:
        raise InvalidValueError(
            f"guidance_end {params.guidance_end} leaves no step after guidance_start {params.guidance_start}: "
            "send a larger guidance_end, or cfg_scale 1 for no guidance at all",
            "guidance_end",
        )
    if model.edm and (params.guidance_start > 0 or params.guidance_end < 1):
        raise InvalidValueError(
            f"guidance_start and guidance_end are shares of training timesteps, which {model.name} does not have: "
            "only 0 and 1 allowed",
            "guidance_start",
        )


def _check_family(params: GenerationParams, model: ModelSpec) -> None:
    for param in ("prompt_2", "negative_prompt_2"):
        if getattr(params, param) is not None and model.family != "sdxl":
            raise InvalidValueError(f"{param} needs a model with two text encoders; {model.name} has one", param)
    if params.enable_refiner and model.refiner is None:
        raise InvalidValueError(f"enable_refiner: {model.name} has no refiner", "enable_refiner")


def _reading(params: GenerationParams, model: ModelSpec) -> TextReading:
    clip_skip = params.clip_skip if params.clip_skip is not None else MIN_CLIP_SKIP
    _check_range("clip_skip", clip_skip, MIN_CLIP_SKIP, MAX_CLIP_SKIP)
    named = {
        "syntax": _choose(Choices("prompt_syntax", get_args(PromptSyntax)), params.prompt_syntax),
        "emphasis": _choose(Choices("emphasis", get_args(Emphasis)), params.emphasis),
        "long_prompt": _choose(Choices("long_prompt", get_args(LongPrompt)), params.long_prompt),
    }
    return TextReading.model_validate(named | {"clip_skip": clip_skip, "max_chunks": model.max_prompt_chunks})


def _inpaint(params: GenerationParams) -> InpaintPlan | None:
    """How a mask is used, None without one."""
    _check_range("mask_blur", params.mask_blur, 0, MAX_MASK_BLUR)
    _check_range("inpaint_padding", params.inpaint_padding, 0, MAX_INPAINT_PADDING)
    area = _choose(Choices("inpaint_area", get_args(InpaintArea)), params.inpaint_area)
    fill = _choose(Choices("inpaint_fill", get_args(InpaintFill)), params.inpaint_fill)
    if params.mask_image is None:
        return None
    if params.image is None:
        raise InvalidValueError("mask_image needs image: the picture in which its white part is repainted", "image")
    fields = {"blur": params.mask_blur, "area": area, "padding": params.inpaint_padding, "fill": fill}
    return InpaintPlan.model_validate(fields)


def _strength(params: GenerationParams, model: ModelSpec, steps: int) -> float | None:
    """Strength of an img2img request, None without a picture.

    It must leave a step of the whole schedule. With a refiner that is enough too: what falls below `REFINER_SHARE`, so
    that the base does not run it, is the refiner's, which runs its share whatever the strength (as in diffusers).
    """
    strength = params.strength if params.strength is not None else model.defaults.strength
    _check_range("strength", strength, MIN_STRENGTH, MAX_STRENGTH)
    if params.image is None:
        return None
    if int(steps * strength) < 1:
        least = math.ceil(10_000 / steps) / 10_000  # rounded up: the value that is named must work
        raise InvalidValueError(
            f"strength {strength} with {steps} steps leaves no denoising step; use at least {least}", "strength"
        )
    return strength
