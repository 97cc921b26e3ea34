"""Errors in the form of A1111's API, together with the fields of the contract's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deployments.api.errors import Failure, told

THEIR_NAMES = {
    "model_name": "sd_model_checkpoint",
    "sampler": "sampler_name",
    "style_preset": "styles",
    "strength": "denoising_strength",
    "image": "init_images",
    "mask_image": "mask",
    "inpaint_padding": "inpaint_full_res_padding",
    "enable_refiner": "refiner_checkpoint",
    "controlnets": "alwayson_scripts",
    "controlnet_name": "alwayson_scripts",
    "hires": "enable_hr",
    "hires.scale": "hr_scale",
    "hires.steps": "hr_second_pass_steps",
    "hires.strength": "denoising_strength",
    "hires.upscaler": "hr_upscaler",
}
"""Fields of this project -> the corresponding fields of A1111."""

EXTRAS_NAMES = {"upscaler": "upscaler_1", "scale": "upscaling_resize"}
"""The same where pictures are enlarged."""


class WebuiError(BaseModel):
    """A1111's body (`error`, `detail`, `body`, `errors`), and the contract's fields."""

    error: str
    """The type."""
    detail: str | list[dict[str, Any]]
    """The problem; for a body that does not fit the schema, FastAPI's list."""
    body: Literal[""] = ""
    errors: str
    """The problem, in words."""
    object: Literal["error"] = "error"
    message: str
    type: str
    param: str | None
    code: int


def answer(error: BaseException, request_id: str) -> JSONResponse:
    """The reply to an exception."""
    return _reply(told(error, request_id), {})


def answer_drawing(error: BaseException, request_id: str) -> JSONResponse:
    """The reply to an exception of a drawing route; fields have the client's names."""
    return _reply(told(error, request_id), THEIR_NAMES)


def answer_extras(error: BaseException, request_id: str) -> JSONResponse:
    """The reply to an exception of an enlarging route; fields have the client's names."""
    return _reply(told(error, request_id), EXTRAS_NAMES)


def _reply(failure: Failure, names: Mapping[str, str]) -> JSONResponse:
    param = names.get(failure.param or "", failure.param)
    message = re.sub(r"\bhires\.\w+", lambda found: names.get(found[0], found[0]), failure.message)
    if param is not None and failure.param is not None and message.startswith(failure.param):
        message = param + message.removeprefix(failure.param)
    body = WebuiError(
        error=failure.type,
        detail=failure.detail if failure.detail is not None else message,
        errors=message,
        message=message,
        type=failure.type,
        param=param,
        code=failure.code,
    )
    return failure.with_body(body.model_dump())
