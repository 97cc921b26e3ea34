"""Requests, replies and pictures of the HTTP contract."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
from PIL import Image

PATH = "/v1/image/generation"
SMALL = {"model_name": "SD1.5", "prompt": "a cat", "width": 128, "height": 128, "steps": 3, "seed": 7}


async def post(client: httpx.AsyncClient, path: str = PATH, **fields: Any) -> httpx.Response:
    """Send a small request with these fields."""
    return await client.post(path, json=SMALL | fields)


def check(reply: httpx.Response, status: int, code: int, param: str | None) -> str:
    """Assert the error body of the contract; returns its message."""
    assert reply.status_code == status, reply.text
    return check_body(reply.json(), code, param, detailed=status == 422)


def check_body(body: dict[str, Any], code: int, param: str | None, detailed: bool = False) -> str:
    """Assert an error body, of a reply or of an `error` event; returns its message."""
    said = {key: body[key] for key in ("message", "type", "param", "code")}
    assert body["object"] == "error"
    assert body["error"] == said
    assert (body["code"], body["param"]) == (code, param)
    assert ("detail" in body) == detailed
    assert "Traceback" not in json.dumps(body)
    return str(body["message"])


def picture(reply: httpx.Response) -> Image.Image:
    """The picture of a reply."""
    assert reply.status_code == 200, reply.text
    return decoded(reply.json()["images"][0]["image"])


def decoded(text: str) -> Image.Image:
    """A picture in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def encoded(data: bytes) -> str:
    """Bytes as a request carries them."""
    return base64.b64encode(data).decode()


def pixels(image: Image.Image) -> np.ndarray:
    """`[height, width, 3]`, integers, so that differences do not wrap."""
    return np.asarray(image.convert("RGB")).astype(int)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Events of a stream, as a browser's EventSource would see them."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def photo(width: int = 90, height: int = 70, kind: str = "PNG") -> bytes:
    """A noisy picture, in a file of a format: one with edges everywhere."""
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def blank(width: int, height: int) -> str:
    """A black PNG of any size in few bytes, in base64."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG", optimize=True)
    return encoded(buffer.getvalue())


async def outcome(client: httpx.AsyncClient, streamed: bool, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer to a small request, plain or streamed."""
    body = SMALL | {"output_format": "png"} | ({"stream": True} if streamed else {})
    return await client.post(PATH, json=body, headers=headers)


def check_outcome(reply: httpx.Response, streamed: bool, status: int, code: int, param: str | None = None) -> str:
    """Assert an error, plain or as the last event; returns its message."""
    if not streamed:
        return check(reply, status, code, param)
    assert reply.status_code == 200
    name, data = events(reply.text)[-1]
    assert name == "error"
    return check_body(data, code, param)


def drawn(reply: httpx.Response, streamed: bool) -> np.ndarray:
    """Pixels of an answer, plain or streamed."""
    if not streamed:
        return pixels(picture(reply))
    name, data = events(reply.text)[-1]
    assert name == "result", data
    return pixels(decoded(data["images"][0]["image"]))
