"""A strict checker of Serve configs: Ray accepts typos at nearly every level, or finds them when half is deployed.

`make serve` and the launcher refuse a config in which it finds a problem. It also runs by itself:

    python -m deployments.strict_config serve_config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from config.catalog import CatalogError
from deployments.app import AppArgs, deployment_names

Config = dict[str, Any]
GRAPH = "deployments.app:build_app"


def problems(config: Config) -> Iterator[str]:
    """What Ray would refuse or take without a word: unknown fields and deployments, bad autoscaling, odd GPU shares."""
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        yield "a Serve config is a mapping with a list of applications"
        return
    yield from _unknown(ServeDeploySchema, config, "$")
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        yield str(error)
    for application in config["applications"]:
        yield from _deployments(application)


def _deployments(application: Config) -> Iterator[str]:
    if application.get("import_path") == GRAPH:
        try:
            known = deployment_names(AppArgs.model_validate(application.get("args") or {}))
        except (ValueError, CatalogError) as error:
            yield f"args: {error}"
            return
        for name in sorted({d["name"] for d in application.get("deployments", [])} - known):
            yield f"deployment {name!r} is none of this graph's: {', '.join(sorted(known))}"
    for deployment in application.get("deployments", []):
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
        gpus = (deployment.get("ray_actor_options") or {}).get("num_gpus") or 0
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


def check(file: Path) -> Config:
    """The config in a file.

    Raises:
        ValueError: it is not YAML, or has problems, each of which is a line of the message.
    """
    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: {error}") from error
    if complaints := list(problems(config)):
        raise ValueError("\n".join(f"{file}: {complaint}" for complaint in complaints))
    return dict(config)


if __name__ == "__main__":
    try:
        for argument in sys.argv[1:]:
            check(Path(argument))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
