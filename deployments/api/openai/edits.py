"""`POST /v1/images/edits`: a picture to change, in a form or in JSON, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from config.catalog import Catalog
from deployments.api.encoding import decode_base64
from deployments.api.openai.requests import EditRequest
from deployments.ray_compat import cause_of
from pipelines.errors import InvalidValueError, RequestError
from pipelines.pictures.images import picture_size
from pipelines.pictures.masks import mask_of_holes
from pipelines.plan import GenerationParams


def edit_of(asked: EditRequest, catalog: Catalog, max_pixels: int) -> GenerationParams:
    """The parameters of an edit; a mask of more than `max_pixels` is not decoded.

    Raises:
        TooLargeError: it has more.
        InvalidValueError: no picture, several, or one that cannot be read; a value that cannot be honoured.
    """
    sent = asked.images if asked.images is not None else asked.image
    pictures = sent if isinstance(sent, list) else [sent]
    if len(pictures) > 1:
        raise InvalidValueError(f"image: {len(pictures)} pictures; models here start from one", "image")
    source = _bytes(pictures[0] if pictures else None, "image")
    if source is None:
        raise InvalidValueError("image is missing: send it as a file, in base64 or as a data URI", "image")
    mask = _bytes(asked.mask, "mask")
    if mask is not None:
        picture_size(mask, "mask", max_pixels)
    edit = asked.for_edit(catalog, source, nearest_size(source, asked.model_name or catalog.default_model(), catalog))
    return replace(edit, mask_image=mask_of_holes(mask, "mask") if mask is not None else None)


@contextmanager
def in_openais_words() -> Iterator[None]:
    """Within the block, errors about `mask_image` are raised about `mask`, which is the client's name of the field."""
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        if not isinstance(cause, RequestError) or cause.param != "mask_image":
            raise
        message = cause.message.replace("mask_image", "mask").replace("make it white", "make it transparent, or white,")
        raise type(cause)(message, "mask") from error


def nearest_size(source: bytes, model: str, catalog: Catalog) -> dict[str, int]:
    """The size, among those a model draws best, of the shape that is nearest to a picture's; its own for no model."""
    width, height = picture_size(source, "image")
    sizes = catalog.sizes_of(model)
    best = min(sizes, key=lambda size: abs(size.width * height - size.height * width) / size.height, default=None)
    return {"width": best.width, "height": best.height} if best else {"width": width, "height": height}


def _bytes(value: Any, param: str) -> bytes | None:
    """A picture of a body: a file, base64, a data URI, or an object around one."""
    if isinstance(value, dict):
        if value.get("file_id") is not None:
            raise InvalidValueError(f"{param}: this server keeps no files; send the picture itself", param)
        value = value.get("image_url", value.get("url", value.get("b64_json")))
        value = value.get("url") if isinstance(value, dict) else value
    if isinstance(value, list) and len(value) == 1:
        return _bytes(value[0], param)
    if value is None or isinstance(value, bytes):
        if value == b"":
            raise InvalidValueError(f"{param} is empty", param)
        return value
    if isinstance(value, str):
        return decode_base64(value, param)
    raise InvalidValueError(f"{param} is not a picture: send a file, base64 or a data URI", param)
