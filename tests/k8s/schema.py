"""Manifests against schemas, offline: Kubernetes' own, and those of the custom resources as JSON Schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError

SCHEMAS = Path(__file__).with_name("schemas")
KUBERNETES = "1.33"
CUSTOM = {
    ("ray.io/v1", "RayService"): "rayservice.v1.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitor.v1.json",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "prometheusrule.v1.json",
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): "httproute.v1.json",
}


def errors(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a document; a kind without a schema is wrong."""
    kind = (document["apiVersion"], document["kind"])
    if kind in CUSTOM:
        for error in _custom(CUSTOM[kind]).iter_errors(_without_nulls(document)):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"no schema for {kind}"


@functools.cache
def _custom(name: str) -> Any:
    schema = json.loads((SCHEMAS / name).read_text())["schema"]
    for field in ("apiVersion", "kind", "metadata"):
        schema["properties"].setdefault(field, {})
    checks = {"x-kubernetes-list-type": _map_keys_differ, "pattern": _pattern_of_strings}
    return validators.extend(Draft202012Validator, checks)(_strict(schema))


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The API server's dialect of OpenAPI v3 as JSON Schema that refuses unknown fields (fieldValidation=Strict)."""
    result = {key: value for key, value in schema.items() if key not in ("properties", "items", "required")}
    for rule in (_number_or_text, _may_be_null, _exclusive_bounds):
        rule(result)
    fields = schema.get("properties", {})
    if fields:
        result["properties"] = {name: _strict(field) for name, field in fields.items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    # What has a default is filled in before anything is required of it.
    if needed := [name for name in schema.get("required", []) if "default" not in fields.get(name, {})]:
        result["required"] = needed
    if isinstance(schema.get("items"), dict):
        result["items"] = _strict(schema["items"])
    return result


def _number_or_text(schema: dict[str, Any]) -> None:
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]


def _may_be_null(schema: dict[str, Any]) -> None:
    if schema.pop("nullable", False) and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]


def _exclusive_bounds(schema: dict[str, Any]) -> None:
    """OpenAPI 3.0 marks a bound as exclusive, JSON Schema names another one."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive):
            schema[exclusive] = schema.pop(bound)


def _map_keys_differ(_: Any, kind: str, instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    """Entries of a list that is a map must differ in its keys; a key left out counts as its default."""
    if kind != "map" or not isinstance(instance, list):
        return
    defaults = {name: field.get("default") for name, field in schema["items"].get("properties", {}).items()}
    keys = schema.get("x-kubernetes-list-map-keys", [])
    identities = [tuple((defaults | item).get(key) for key in keys) for item in instance]
    for identity in {i for i in identities if identities.count(i) > 1}:
        yield ValidationError(f"several entries with {keys} {identity}")


def _pattern_of_strings(_: Any, pattern: str, instance: Any, __: dict[str, Any]) -> Iterator[ValidationError]:
    """A quantity may be a plain number, of which patterns say nothing."""
    if isinstance(instance, str) and not re.search(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _without_nulls(value: Any) -> Any:
    """To the API server a null field is an absent one."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
