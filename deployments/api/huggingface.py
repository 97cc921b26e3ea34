"""Hugging Face's inference API on a URL: `{"inputs", "parameters"}` in, a picture's bytes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from deployments.api.admission import caller_of
from deployments.api.connection import until_disconnect
from deployments.api.forms import validated
from deployments.api.raw import accepted_format, bytes_reply
from deployments.api.schemas import PictureRequest
from deployments.ingress.ingress import Ingress
from pipelines.sampling.samplers import SAMPLERS


class InferenceRequest(BaseModel):
    """What `InferenceClient` sends to a model that is a URL."""

    model_config = ConfigDict(extra="ignore")

    inputs: str = Field(
        description="The prompt; or, if parameters.prompt is given, the picture to start from, in base64."
    )
    parameters: dict[str, Any] | None = Field(
        None, description="Every field of /v1/image/generation; scheduler is a sampler or a class of diffusers."
    )


async def generate(ingress: Ingress, model: str, body: InferenceRequest, request: Request) -> Response:
    """One picture; `Accept` names its format."""
    asked = validated(PictureRequest, fields_of(model, body))
    output_format = asked.output_format or accepted_format(request) or "jpeg"
    work = ingress.generate(asked.to_params(output_format=output_format), caller_of(request))
    return bytes_reply(await until_disconnect(request, work))


def fields_of(model: str, body: InferenceRequest) -> dict[str, Any]:
    """The request in this project's fields."""
    fields = dict(body.parameters or {})
    prompt = fields.pop("prompt", None)
    if prompt is not None:
        fields |= {"image": body.inputs}
    size = fields.pop("target_size", None)
    if isinstance(size, Mapping):
        fields |= {side: size[side] for side in ("width", "height") if side in size}
    scheduler = fields.pop("scheduler", None)
    if scheduler is not None and fields.get("sampler") is None:
        fields["sampler"] = _SAMPLER_OF.get(str(scheduler), scheduler)
    return fields | {"model_name": model, "prompt": prompt if prompt is not None else body.inputs}


_SAMPLER_OF = {spec.scheduler: name for name, spec in reversed(list(SAMPLERS.items()))}
"""A class of diffusers -> the first of its samplers."""
