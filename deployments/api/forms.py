"""Bodies that are a form or JSON: one mapping of fields, files as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from deployments.api.scope import CONTENT_TYPE
from pipelines.errors import InvalidValueError

M = TypeVar("M", bound=BaseModel)

MOST_FILES = 16
"""OpenAI's limit of pictures in one edit."""
MOST_FIELDS = 200


async def fields_of(request: Request, max_bytes: int) -> dict[str, Any]:
    """The fields of a body. Fields of a form that are repeated or called `name[]` become lists, files become bytes.

    Raises:
        InvalidValueError: a form that breaks off, or one of too many parts.
        RequestValidationError: no form, and no JSON object either.
    """
    sent_as = str(request.scope.get(CONTENT_TYPE, ""))
    if sent_as.partition(";")[0].strip().lower() != "multipart/form-data":
        return _json_object(await request.body())
    parser = MultiPartParser(
        Headers({"content-type": sent_as}),
        request.stream(),
        max_files=MOST_FILES,
        max_fields=MOST_FIELDS,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes  # the whole body is in memory already: nothing goes to a disk
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        raise InvalidValueError(f"the form cannot be read: {getattr(error, 'message', error)}") from None
    try:
        return _grouped([(name, await _value(part)) for name, part in form.multi_items()])
    finally:
        await form.close()


async def _value(part: UploadFile | str) -> bytes | str:
    return await part.read() if isinstance(part, UploadFile) else part


def _grouped(parts: Iterable[tuple[str, bytes | str]]) -> dict[str, Any]:
    """Lists of the values of names that are repeated or end in `[]`, the value of each other name."""
    values: dict[str, list[bytes | str]] = {}
    lists = set()
    for name, value in parts:
        key = name.removesuffix("[]")
        values.setdefault(key, []).append(value)
        if key != name or len(values[key]) > 1:
            lists.add(key)
    return {name: value if name in lists else value[0] for name, value in values.items()}


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except json.JSONDecodeError as error:
        raise _no_json(error.pos, error.msg) from None
    except (UnicodeDecodeError, RecursionError):
        raise _no_json(0, "not UTF-8, or nested too deeply") from None
    if not isinstance(fields, dict):
        told = {"type": "model_attributes_type", "loc": ("body",), "msg": "Input should be a JSON object or a form"}
        raise RequestValidationError([told])
    return fields


def _no_json(position: int, reason: str) -> RequestValidationError:
    """The error that FastAPI raises for such a body."""
    told = {"type": "json_invalid", "loc": ("body", position), "msg": "JSON decode error", "ctx": {"error": reason}}
    return RequestValidationError([told])


def validated(schema: type[M], fields: Mapping[str, Any]) -> M:
    """The fields as a request; what is wrong with them is told as FastAPI tells it of bodies it reads itself."""
    try:
        return schema.model_validate(dict(fields))
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def documented(schema: type[BaseModel], files: Iterable[str], required: Iterable[str] = ()) -> Mapping[str, Any]:
    """The entry of /openapi.json for such a body: `schema` as JSON, or as a form with these files."""
    described = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    form = {k: v for k, v in described.items() if k != "$defs"}
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    form["properties"] = form["properties"] | dict.fromkeys(files, binary)
    form["required"] = [*required]
    content = {"application/json": {"schema": described}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
