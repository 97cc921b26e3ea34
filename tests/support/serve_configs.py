"""The strict checker of Serve configs: Ray's own takes typos at nearly every level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

Config = dict[str, Any]


def problems(config: Config) -> Iterator[str]:
    """What Ray would refuse, and what it would take without a word: unknown fields, bad autoscaling, odd GPU shares."""
    yield from _unknown(ServeDeploySchema, config, "$")
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        yield str(error)
    for deployment in (d for app in config["applications"] for d in app.get("deployments", [])):
        name, scaling = deployment["name"], deployment.get("autoscaling_config")
        if isinstance(scaling, dict):
            yield from (
                f"{name}: {key} is no autoscaling field"
                for key in scaling.keys() - AutoscalingConfig.model_fields.keys()
            )
            try:
                AutoscalingConfig(**{k: v for k, v in scaling.items() if k in AutoscalingConfig.model_fields})
            except ValueError as error:
                yield f"{name}: {error}"
        gpus = (deployment.get("ray_actor_options") or {}).get("num_gpus", 0)
        if gpus > 1 and gpus != int(gpus):
            yield f"{name}: num_gpus {gpus} must be whole above 1"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _unknown(model: type[BaseModel], data: Any, path: str) -> Iterator[str]:
    if not isinstance(data, dict):
        return
    fields = {field.alias or name: field for name, field in model.model_fields.items()} | model.model_fields
    for key, value in data.items():
        if key not in fields:
            yield f"{path}.{key} is no field"
            continue
        for inner in list(_models(fields[key].annotation))[:1]:
            for item in value if isinstance(value, list) else [value]:
                yield from _unknown(inner, item, f"{path}.{key}")
