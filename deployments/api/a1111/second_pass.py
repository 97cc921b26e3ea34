"""A1111's hires fix."""

from __future__ import annotations

from dataclasses import replace

from config.catalog import Catalog
from deployments.api.a1111.checkpoints import checkpoint
from deployments.api.a1111.names import sampler_of
from deployments.api.a1111.requests import Txt2ImgRequest
from pipelines.enlargement import MAX_SCALE, MIN_SCALE, HiresParams
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams

STRENGTH = 0.75
"""A1111's default of `denoising_strength`."""


def with_second_pass(params: GenerationParams, body: Txt2ImgRequest, catalog: Catalog) -> GenerationParams:
    """The parameters with a second pass, if the request enables one.

    Raises:
        InvalidValueError: something that differs from the first pass and cannot.
    """
    _check_same(params, body, catalog)
    strength = STRENGTH if body.denoising_strength is None else body.denoising_strength
    if strength == 0:
        raise InvalidValueError("denoising_strength 0 draws nothing in a second pass: use more", "denoising_strength")
    hires = HiresParams(
        scale=_scale(params, body),
        steps=body.hr_second_pass_steps or None,
        strength=strength,
        upscaler=body.hr_upscaler,
    )
    return replace(params, hires=hires)


def _check_same(params: GenerationParams, body: Txt2ImgRequest, catalog: Catalog) -> None:
    sampler = params.sampler or ""
    if body.hr_sampler_name is not None or body.hr_scheduler is not None:
        sampler = sampler_of(body.hr_sampler_name or body.sampler, body.hr_scheduler or body.scheduler, sampler)
    model = params.model_name
    if body.hr_checkpoint_name is not None:
        model = checkpoint(body.hr_checkpoint_name, catalog, "hr_checkpoint_name").name
    same = {
        "hr_sampler_name": sampler == params.sampler,
        "hr_checkpoint_name": model == params.model_name,
        "hr_prompt": body.hr_prompt in ("", body.prompt),
        "hr_negative_prompt": body.hr_negative_prompt in ("", body.negative_prompt),
        "firstphase_width": body.firstphase_width <= 0,
        "firstphase_height": body.firstphase_height <= 0,
    }
    for name, is_same in same.items():
        if not is_same:
            raise InvalidValueError(
                f"{name} is not possible here: the second pass has what the first one has. Leave it out", name
            )


def _scale(params: GenerationParams, body: Txt2ImgRequest) -> float:
    """The factor of both sides; a requested size must have the shape of the first pass."""
    wanted = {"hr_resize_x": (body.hr_resize_x, params.width), "hr_resize_y": (body.hr_resize_y, params.height)}
    scales = {name: side / of for name, (side, of) in wanted.items() if side and of}
    if not scales:
        return body.hr_scale
    name, scale = next(iter(scales.items()))
    if len(set(scales.values())) > 1:
        raise InvalidValueError(
            f"hr_resize_x {body.hr_resize_x} and hr_resize_y {body.hr_resize_y} are of another shape than "
            f"{params.width}x{params.height}; send one of them",
            "hr_resize_y",
        )
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise InvalidValueError(
            f"{name} is {scale:g} times as large as the first pass; it may be {MIN_SCALE} to {MAX_SCALE} times", name
        )
    return scale
