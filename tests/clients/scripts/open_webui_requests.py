"""What Open WebUI 0.12.4 sends (`routers/images.py`), by the HTTP library that it uses.

Its own package asks for gigabytes, so it is not installed. Both engines: AUTOMATIC1111 and OpenAI, edits too.
"""

import asyncio
import base64
import sys
from pathlib import Path
from typing import Any

import aiohttp

url, key, folder = sys.argv[1:]
BASIC = "Basic " + base64.b64encode(f"admin:{key}".encode()).decode()
BEARER = f"Bearer {key}"


def save(name: str, data: str) -> None:
    """As its `get_image_data` reads a picture: with or without the prefix of a data URI."""
    (Path(folder) / name).write_bytes(base64.b64decode(data.split(",", 1)[-1]))


async def automatic1111(session: aiohttp.ClientSession) -> None:
    api, headers = f"{url}/sdapi/v1", {"authorization": BASIC}
    async with session.get(f"{api}/options", headers={"Authorization": BASIC}) as reply:  # the settings page's check
        reply.raise_for_status()
    async with session.get(f"{api}/sd-models", headers=headers) as reply:
        models = {model["title"]: model["model_name"] for model in await reply.json()}
    (chosen,) = (title for title, name in models.items() if name == "SD1.5")
    async with session.get(f"{api}/options", headers=headers) as reply:
        options = await reply.json()
    options["sd_model_checkpoint"] = chosen  # and all others are sent back with it
    async with session.post(f"{api}/options", json=options, headers=headers) as reply:
        reply.raise_for_status()
    async with session.get(f"{api}/options", headers=headers) as reply:
        assert (await reply.json())["sd_model_checkpoint"] == chosen
    body = {"prompt": "an apple", "batch_size": 2, "width": 256, "height": 256, "steps": 8, "negative_prompt": "fog"}
    extra = {"cfg_scale": 5, "sampler_name": "Euler a", "scheduler": "Automatic"}  # the admin's further parameters
    async with session.post(f"{api}/txt2img", json=body | extra, headers=headers) as reply:
        told = await reply.json(content_type=None)
    assert told["info"], told
    for number, image in enumerate(told["images"]):
        save(f"automatic1111-{number}.png", image)
    async with session.get(f"{api}/options", headers={"authorization": ""}) as reply:  # no credentials configured
        assert reply.status == 401, reply.status


async def openai(session: aiohttp.ClientSession) -> None:
    headers = {"Authorization": BEARER, "Content-Type": "application/json"}
    asked: dict[str, Any] = {"prompt": "a penguin in the snow", "n": 1, "size": "256x256"}
    bodies = {
        "dall-e": {"model": "dall-e-2", **asked, "response_format": "b64_json"},
        "gpt-image": {"model": "gpt-image-1", **asked, "steps": 8},
    }
    for name, body in bodies.items():
        query = "?api-version=2025-04-01-preview" if name == "gpt-image" else ""
        async with session.post(f"{url}/v1/images/generations{query}", json=body, headers=headers) as reply:
            reply.raise_for_status()
            told = await reply.json(content_type=None)
        for image in told["data"]:
            save(f"{name}.png", image.get("url") or image["b64_json"])


async def edits(session: aiohttp.ClientSession) -> None:
    picture = (Path(folder) / "dall-e.png").read_bytes()
    for field in ("image", "image[]"):
        form = aiohttp.FormData()
        fields = {"model": "dall-e-2", "prompt": "a cat", "n": 1, "size": "256x256", "response_format": "b64_json"}
        for name, value in fields.items():
            form.add_field(name, str(value))
        form.add_field(field, picture, filename="image.png", content_type="image/png")
        async with session.post(f"{url}/v1/images/edits", headers={"Authorization": BEARER}, data=form) as reply:
            reply.raise_for_status()
            told = await reply.json(content_type=None)
        save(f"edited-{field.strip('[]')}-{'several' if '[' in field else 'one'}.png", told["data"][0]["b64_json"])


async def main() -> None:
    async with aiohttp.ClientSession() as session:
        await automatic1111(session)
        await openai(session)
        await edits(session)


asyncio.run(main())
