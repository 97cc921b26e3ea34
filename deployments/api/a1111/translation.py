"""Translates A1111's requests to this project's parameters."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from config.catalog import Catalog, ModelSpec
from config.choices import UnknownChoiceError
from deployments.api.a1111.checkpoints import short_hash
from deployments.api.a1111.names import sampler_of, unknown
from deployments.api.a1111.options import Options
from deployments.api.a1111.requests import MOST_PICTURES, Img2ImgRequest, Txt2ImgRequest, WebuiRequest
from deployments.api.a1111.second_pass import STRENGTH, with_second_pass
from deployments.api.a1111.units import DetectedMap, with_units
from deployments.api.encoding import decode_base64
from pipelines.errors import InvalidValueError
from pipelines.pictures.images import picture_size
from pipelines.pictures.masks import mask_of_strokes
from pipelines.plan import REFINER_SHARE, SEED_LIMIT, GenerationParams
from pipelines.sampling.samplers import SAMPLERS

FILLS = {0: "surroundings", 1: "original", 2: "noise", 3: "nothing"}
"""`inpainting_fill` -> ours."""
LATENT_UPSCALE = 3
"""The `resize_mode` that enlarges latents, not pixels."""
_IMPOSSIBLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "subseed_strength": ((0,), "there are no variation seeds"),
    "restore_faces": ((False,), "there is no face restorer"),
    "tiling": ((False,), "pictures do not tile"),
    "s_churn": ((0,), "samplers run without churn"),
    "s_noise": ((0, 1), "samplers draw noise at its own scale"),  # 0 is in the examples of A1111's own document
    "initial_noise_multiplier": ((1,), "noise has its own scale"),
    "script_name": ((None,), "there are no scripts"),
}
"""Fields of which only some values are possible, and why."""


@dataclass(frozen=True)
class TranslatedRequest:
    """A request of A1111's API, translated."""

    params: GenerationParams
    """Of the first picture."""
    maps: tuple[DetectedMap, ...]
    """Control maps that the reply shows."""
    count: int
    batch_size: int
    model: ModelSpec
    model_hash: str
    options: Options

    def each(self) -> list[GenerationParams]:
        """The pictures, of consecutive seeds."""
        seed = self.params.seed or 0
        return [replace(self.params, seed=(seed + i) % SEED_LIMIT) for i in range(self.count)]


def translated(body: WebuiRequest, options: Options, catalog: Catalog, max_pixels: int) -> TranslatedRequest:
    """Translate a request with its options; pictures of more than `max_pixels` are not decoded.

    Raises:
        UnavailableModelError: an unknown or unserved checkpoint.
        TooLargeError: a picture of too many pixels.
        InvalidValueError: a value that cannot be honoured.
    """
    _check_possible(body)
    model = options.model(catalog, body.model)
    options.check(model)
    defaults = model.defaults
    prompt, negative = _styled(body, catalog)
    sampler = sampler_of(body.sampler, body.scheduler, defaults.sampler)
    params = GenerationParams(
        model_name=model.name,
        prompt=prompt,
        negative_prompt=negative or None,  # as in A1111, an empty one is a zero embedding where the model has that
        prompt_syntax="weighted",
        emphasis=options.emphasis or "Original",
        clip_skip=_clip_skip(body, options, model),
        width=body.width or defaults.width,
        height=body.height or defaults.height,
        steps=body.steps or defaults.steps,
        cfg_scale=defaults.cfg_scale if body.cfg_scale is None else body.cfg_scale,
        sampler=sampler,
        eta=_eta(body, sampler),
        seed=secrets.randbelow(SEED_LIMIT) if body.seed < 0 else body.seed,
        enable_refiner=_wants_refiner(body, model),
        output_format=options.file_format,
        output_quality=options.quality,
    )
    if isinstance(body, Img2ImgRequest):
        params = _with_picture(params, body, max_pixels)
    elif isinstance(body, Txt2ImgRequest) and body.enable_hr:
        params = with_second_pass(params, body, catalog)
    params, maps = with_units(params, body.alwayson_scripts, model, catalog, max_pixels)
    return TranslatedRequest(params, maps, body.count, body.batch_size, model, short_hash(model, catalog), options)


def _check_possible(body: WebuiRequest) -> None:
    for name, (possible, reason) in _IMPOSSIBLE.items():
        value = getattr(body, name, possible[0])
        if value not in possible:
            raise InvalidValueError(f"{name} {value} is not possible here: {reason}. Leave it out", name)
    for name in ("seed_resize_from_h", "seed_resize_from_w"):
        if getattr(body, name) > 0:
            raise InvalidValueError(f"{name} is not possible here: noise has the picture's own size", name)
    if body.count > MOST_PICTURES:
        raise InvalidValueError(
            f"batch_size {body.batch_size} and n_iter {body.n_iter} are {body.count} pictures; "
            f"at most {MOST_PICTURES} in one request",
            "batch_size",
        )


def _styled(body: WebuiRequest, catalog: Catalog) -> tuple[str, str | None]:
    prompt, negative = body.prompt, body.negative_prompt or None
    if not body.styles:
        return prompt, negative
    choices = catalog.style_choices()
    for name in body.styles:
        try:
            style = catalog.style(choices.resolve(name))
        except UnknownChoiceError as error:
            raise unknown("styles", name, choices.names, error.suggestion) from None
        prompt, negative = style.applied(prompt, negative)
    return prompt, negative


def _clip_skip(body: WebuiRequest, options: Options, model: ModelSpec) -> int | None:
    """The clip skip of a request; none with SDXL, as in A1111."""
    own = body.override_settings.get("CLIP_stop_at_last_layers")
    wanted = body.clip_skip if own is None and body.clip_skip is not None else options.CLIP_stop_at_last_layers
    return None if model.family == "sdxl" else wanted


def _eta(body: WebuiRequest, sampler: str) -> float:
    """The eta of a request for DDIM. Clients send A1111's defaults, 0 and 1, with every sampler; they are ignored."""
    if body.eta is None or (body.eta in (0, 1) and not SAMPLERS[sampler].eta):
        return 0.0
    return body.eta


def _wants_refiner(body: WebuiRequest, model: ModelSpec) -> bool:
    if body.refiner_checkpoint is None or body.refiner_switch_at == 1:
        return False
    if model.refiner is None:
        raise InvalidValueError(f"refiner_checkpoint: {model.name} has no refiner", "refiner_checkpoint")
    if body.refiner_checkpoint.partition(" [")[0].strip().casefold() != model.refiner:
        raise unknown("refiner_checkpoint", body.refiner_checkpoint, [model.refiner])
    if body.refiner_switch_at not in (None, REFINER_SHARE):
        raise InvalidValueError(
            f"refiner_switch_at {body.refiner_switch_at} is not possible here: only {[REFINER_SHARE]} allowed now",
            "refiner_switch_at",
        )
    return True


def _with_picture(params: GenerationParams, body: Img2ImgRequest, max_pixels: int) -> GenerationParams:
    """The parameters with the picture to start from and its mask."""
    if len(body.init_images) != 1:
        told = f"{len(body.init_images)} pictures" if body.init_images else "missing"
        raise InvalidValueError(f"init_images: {told}; send one picture, in base64", "init_images")
    image, mask = decode_base64(body.init_images[0], "init_images"), decode_base64(body.mask, "mask")
    assert image is not None
    strength = STRENGTH if body.denoising_strength is None else body.denoising_strength
    params = replace(params, image=image, strength=strength)
    whole = mask is None or not body.inpaint_full_res
    if body.resize_mode and whole:
        _check_shape(picture_size(image, "init_images"), params, body.resize_mode)
    if mask is None:
        return params
    picture_size(mask, "mask", max_pixels)
    return replace(
        params,
        mask_image=mask_of_strokes(mask, "mask", inverted=body.inpainting_mask_invert == 1),
        mask_blur=float(body.mask_blur),
        inpaint_area="whole" if whole else "masked",
        inpaint_padding=body.inpaint_full_res_padding,
        inpaint_fill=FILLS[body.inpainting_fill],
    )


def _check_shape(size: tuple[int, int], params: GenerationParams, mode: int) -> None:
    """Refuse resize modes that crop or fill; where the shapes agree, all modes are the same."""
    width, height = size
    wanted = (params.width or width, params.height or height)
    if size != wanted and (mode == LATENT_UPSCALE or width * wanted[1] != height * wanted[0]):
        raise InvalidValueError(
            f"resize_mode {mode} of a picture of {width}x{height} to {wanted[0]}x{wanted[1]} is not possible here: "
            "send width and height of its shape, or resize_mode 0, which stretches it",
            "resize_mode",
        )
