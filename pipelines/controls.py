"""The controls of a request: which ControlNets steer its picture, how much, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping

from config.catalog import Catalog, ControlNetSpec, ModelSpec
from config.choices import Choices, UnknownChoiceError
from pipelines.control_plan import MAX_CONTROL_WEIGHT, MAX_CONTROLS, MIN_CONTROL_WEIGHT, ControlParams, ControlUse
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams

LIST, NAME, IMAGE = "controlnets", "controlnet_name", "controlnet_image"


def controls_of(params: GenerationParams, model: ModelSpec, catalog: Catalog) -> tuple[ControlUse, ...]:
    """The controls of a request, in its order. The models made for one require it.

    Raises:
        InvalidValueError: too many, none where one is required, one that the model or this server has not, or a value
            out of range; the message names the entry.
    """
    if params.controlnets:
        _check_list(params, model, catalog)
    else:
        _check_wire_fields(params, model, catalog)
    offered = catalog.controls_of(model.name)
    in_list = bool(params.controlnets)
    return tuple(
        _Entry(f"{LIST}.{i}." if in_list else "controlnet_", LIST if in_list else None).use(control, offered, catalog)
        for i, control in enumerate(params.controls)
    )


def _check_list(params: GenerationParams, model: ModelSpec, catalog: Catalog) -> None:
    for param, value in ((NAME, params.controlnet_name), (IMAGE, params.controlnet_image)):
        if value is not None:
            raise InvalidValueError(
                f"{param} cannot be used beside {LIST}: put that control into the list too, or leave the list out",
                param,
            )
    count = len(params.controlnets)
    if count > MAX_CONTROLS:
        raise InvalidValueError(
            f"{LIST} has {count} entries, and a picture takes {MAX_CONTROLS} at most: leave {count - MAX_CONTROLS} out",
            LIST,
        )
    if not catalog.controls_of(model.name):
        raise InvalidValueError(f"{LIST}: {model.name} has no ControlNet here. {_others(catalog)}", LIST)


def _check_wire_fields(params: GenerationParams, model: ModelSpec, catalog: Catalog) -> None:
    """`controlnet_name` and `controlnet_image` belong to the models that require a ControlNet (the contract)."""
    for param, value in ((NAME, params.controlnet_name), (IMAGE, params.controlnet_image)):
        if value is None and model.requires_controlnet:
            raise InvalidValueError(f"{param} is required with {model.name}, or {LIST} in its place", param)
        if value is not None and not model.requires_controlnet:
            offered = list(catalog.controls_of(model.name))
            way_out = f"Send {LIST}, with {offered}" if offered else f"It has no ControlNet here. {_others(catalog)}"
            raise InvalidValueError(f"{param} is not allowed with {model.name}. {way_out}", param)


def _others(catalog: Catalog) -> str:
    """The models that take controls."""
    takers = [model.name for model in catalog.available_models() if catalog.controls_of(model.name)]
    return f"Only {takers} take one" if takers else "No model of this server does"


class _Entry:
    """One control, and how messages call its fields."""

    def __init__(self, prefix: str, param: str | None) -> None:
        """Fields are called `prefix` and their name; `param` is the field of a request, None if each has its own."""
        self._prefix = prefix
        self._param = param

    def use(self, given: ControlParams, offered: Mapping[str, ControlNetSpec], catalog: Catalog) -> ControlUse:
        name = self._prefix + "name"
        try:
            spec = offered[Choices(name, offered).resolve(given.name)]
        except UnknownChoiceError as error:
            raise InvalidValueError(str(error), self._param or name) from None
        if given.preprocess and spec.name not in catalog.annotator_names():
            raise InvalidValueError(
                f"{name} '{spec.name}': no annotator weights are configured for it (annotators.yaml of the "
                f"catalog). Send a ready control map with {self._prefix}preprocess false, or use one of "
                f"{list(catalog.annotator_names())}",
                self._param or name,
            )
        self._check_range("weight", given.weight, MIN_CONTROL_WEIGHT, MAX_CONTROL_WEIGHT)
        self._check_range("start", given.start, 0, 1)
        self._check_range("end", given.end, 0, 1)
        if given.start >= given.end:
            raise InvalidValueError(
                f"{self._prefix}end {given.end} leaves no step after {self._prefix}start {given.start}: send a larger "
                "end, or leave the entry out",
                self._param,
            )
        return ControlUse(
            name=spec.name,
            component=spec.component,
            mode=spec.mode,
            preprocess=given.preprocess,
            weight=given.weight,
            start=given.start,
            end=given.end,
            guess=given.guess,
        )

    def _check_range(self, field: str, value: float, low: float, high: float) -> None:
        if not (math.isfinite(value) and low <= value <= high):
            raise InvalidValueError(f"{self._prefix}{field} {value} is out of range: {low} to {high}", self._param)
