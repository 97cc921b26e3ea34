"""Translates the units of A1111's ControlNet extension to controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from config.catalog import Catalog, ModelSpec
from config.choices import Choices, UnknownChoiceError
from deployments.api.a1111.names import unknown
from deployments.api.encoding import decode_base64
from pipelines.control_plan import MAX_CONTROL_WEIGHT, MIN_CONTROL_WEIGHT, ControlParams
from pipelines.errors import InvalidValueError
from pipelines.pictures.fitting import Fit, fitted
from pipelines.pictures.images import picture_size
from pipelines.plan import GenerationParams

PARAM = "alwayson_scripts"
SCRIPT = "controlnet"
NO_MODULE = "none"
"""The picture already is the control map."""
_FITS: dict[str | int, Fit] = {
    0: "stretch",
    1: "crop",
    2: "fill",
    "just resize": "stretch",
    "crop and resize": "crop",
    "resize and fill": "fill",
    "scale to fit (inner fit)": "crop",
    "envelope (outer fit)": "fill",
}
"""`resize_mode`, also as older versions spell it."""
_MODES: dict[str | int, bool] = {0: False, 2: True, "balanced": False, "controlnet is more important": True}
"""`control_mode` -> whether the map counts more than the prompt."""


class Unit(BaseModel):
    """One unit. Settings of preprocessors (`processor_res`, thresholds, `pixel_perfect`) are fixed here."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value is not None and value != ""}
        for alias, name in (("input_image", "image"), ("guidance", "guidance_end"), ("input_mask", "mask")):
            if alias in kept:
                kept.setdefault(name, kept.pop(alias))
        return kept

    enabled: bool = True
    module: str = Field(NO_MODULE, max_length=200)
    model: str = Field("None", max_length=300)
    weight: FiniteFloat = Field(1.0, ge=MIN_CONTROL_WEIGHT, le=MAX_CONTROL_WEIGHT)
    image: str | dict[str, Any] | None = None
    mask: Any = None
    resize_mode: str | int = 1
    guidance_start: FiniteFloat = Field(0.0, ge=0, le=1)
    guidance_end: FiniteFloat = Field(1.0, ge=0, le=1)
    control_mode: str | int = 0
    hr_option: str | int = "Both"
    save_detected_map: bool = False


@dataclass(frozen=True)
class DetectedMap:
    """A control map that the reply shows behind the pictures."""

    component: str
    name: str
    photo: bytes


def with_units(
    params: GenerationParams, scripts: dict[str, Any], model: ModelSpec, catalog: Catalog, max_pixels: int
) -> tuple[GenerationParams, tuple[DetectedMap, ...]]:
    """The same, steered by the units of `alwayson_scripts`; the maps that the reply is to show.

    Raises:
        TooLargeError: a picture of more than `max_pixels`.
        InvalidValueError: a script that is not available, or a unit that cannot be honoured.
    """
    units = [unit for i, given in enumerate(_units(scripts)) if (unit := _read(given, i)).enabled]
    controls = tuple(
        _control(unit, i, params, catalog.controls_of(model.name), max_pixels) for i, unit in enumerate(units)
    )
    offered = catalog.controls_of(model.name)
    shown = tuple(
        DetectedMap(offered[control.name].component, control.name, control.image)
        for unit, control in zip(units, controls, strict=True)
        if unit.save_detected_map and control.preprocess
    )
    return replace(params, controlnets=controls), shown


def _units(scripts: dict[str, Any]) -> Sequence[Any]:
    """The units under ControlNet. Clients also send other scripts, empty or with False."""
    units: Sequence[Any] = ()
    for name, script in scripts.items():
        args = script.get("args") if isinstance(script, dict) else script
        used = [arg for arg in args if arg] if isinstance(args, list) else args
        if not used:
            continue
        if name.casefold() != SCRIPT:
            raise InvalidValueError(f"{PARAM} '{name[:100]}' is not available. Only ['ControlNet'] allowed now", PARAM)
        if not isinstance(used, list):
            raise InvalidValueError(f"{PARAM}: the args of ControlNet are not a list of units", PARAM)
        units = used
    return units


def _read(given: Any, position: int) -> Unit:
    try:
        return Unit.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(["args", str(position), *map(str, first["loc"])])
        raise InvalidValueError(f"ControlNet {where}: {first['msg']}", PARAM) from None


def _control(unit: Unit, i: int, params: GenerationParams, offered: Iterable[str], max_pixels: int) -> ControlParams:
    where = f"ControlNet args.{i}"
    try:
        name = Choices(f"{where}.model", offered).resolve(unit.model.partition(" [")[0])
    except UnknownChoiceError as error:
        raise InvalidValueError(f"{error}, with {params.model_name}", PARAM) from None
    if unit.mask is not None:
        raise InvalidValueError(f"{where}.mask is not possible here: a unit steers the whole picture", PARAM)
    if params.hires is not None and unit.hr_option not in ("Both", 0):
        raise InvalidValueError(f"{where}.hr_option: only ['Both'] allowed now", PARAM)
    return ControlParams(
        name=name,
        image=_picture(unit, where, params, max_pixels),
        weight=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        preprocess=_preprocess(unit.module, name, where),
        guess=_of(_MODES, unit.control_mode, f"{where}.control_mode"),
    )


def _preprocess(module: str, name: str, where: str) -> bool:
    """Whether the picture is a photo. A module makes the map of its own ControlNet."""
    if module.casefold() not in (NO_MODULE, name.casefold()):
        raise InvalidValueError(
            f"{where}.module '{module}' makes no map for model '{name}'. Only {[NO_MODULE, name]} allowed now", PARAM
        )
    return module.casefold() != NO_MODULE


def _picture(unit: Unit, where: str, params: GenerationParams, max_pixels: int) -> bytes:
    """The unit's picture, or the one that img2img starts from, in the shape of what is drawn."""
    given = unit.image.get("image") if isinstance(unit.image, dict) else unit.image
    if given is not None and not isinstance(given, str):
        raise InvalidValueError(f"{where}.image is not a picture: send it in base64", PARAM)
    image = decode_base64(given, f"{where}.image", PARAM) or params.image
    if image is None:
        raise InvalidValueError(f"{where}.image is missing: send it in base64", PARAM)
    picture_size(image, PARAM, max_pixels)
    how = _of(_FITS, unit.resize_mode, f"{where}.resize_mode")
    size = (params.width or 0, params.height or 0)
    if params.mask_image is not None and params.image is not None and params.inpaint_area == "masked":
        size = picture_size(params.image, "init_images")  # the map is cut out as the masked part is
    return fitted(image, PARAM, *size, how)


def _of(table: dict[str | int, Any], value: str | int, field: str) -> Any:
    found = table.get(value.strip().casefold() if isinstance(value, str) else value)
    if found is None:
        raise unknown(field, str(value), [str(name) for name in table], param=PARAM)
    return found
