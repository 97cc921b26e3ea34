"""OpenAI's own SDK: pictures, links, streams, edits, masks and errors."""

import base64
import io
import sys
from pathlib import Path

import openai
from PIL import Image, ImageChops

url, key, folder = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
small = {"size": "256x256", "extra_body": {"steps": 8, "seed": 7}}


def save(name: str, b64_json: str | None) -> Image.Image:
    data = base64.b64decode(b64_json or "")
    (Path(folder) / name).write_bytes(data)
    return Image.open(io.BytesIO(data)).convert("RGB")


def png(image: Image.Image) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "a.png", buffer.getvalue()


reply = client.images.generate(prompt="a penguin in the snow", n=2, **small)
assert [item.seed for item in reply.data] == [7, 8], reply.data
assert (reply.size, reply.output_format, reply.usage.total_tokens) == ("256x256", "png", 0)
first = save("generated.png", reply.data[0].b64_json)

asked = {"model": "dall-e-3", "prompt": "a penguin", "response_format": "url", "quality": "standard"}
link = client.images.generate(**asked, **small).data[0].url
assert link.startswith("data:image/png;base64,"), link[:40]

partial = "image_generation.partial_image"
told = list(client.images.generate(model="gpt-image-1", prompt="a penguin", stream=True, partial_images=2, **small))
assert [event.type for event in told] == [partial, partial, "image_generation.completed"], told
assert [event.partial_image_index for event in told[:2]] == [0, 1]
assert told[-1].usage.input_tokens_details.text_tokens == 0
save("streamed.png", told[-1].b64_json)

edited = client.images.edit(image=png(first), prompt="a cat", **small)
save("edited.png", edited.data[0].b64_json)
told = list(client.images.edit(image=[png(first)], prompt="a cat", stream=True, partial_images=1, **small))
assert [event.type for event in told] == ["image_edit.partial_image", "image_edit.completed"], told

# Transparent is repainted: here the left half.
mask = first.copy()
mask.putalpha(255)
mask.paste((0, 0, 0, 0), (0, 0, 128, 256))
edited = client.images.edit(image=png(first), mask=png(mask), prompt="a cat", **small)
masked = save("masked.png", edited.data[0].b64_json)
difference = ImageChops.difference(first, masked)
assert difference.crop((128, 0, 256, 256)).getbbox() is None, "what the mask covers has changed"
assert difference.crop((0, 0, 128, 256)).getbbox() is not None, "nothing was repainted"

assert any(model.id == "SD1.5" for model in client.models.list())

try:
    client.images.generate(prompt="x", background="transparent")
except openai.BadRequestError as error:
    assert (error.param, error.code) == ("background", "40302"), error
    assert "['auto', 'opaque']" in error.message, error
else:
    raise SystemExit("a transparent background was accepted")
try:
    client.images.edit(image=[png(first)] * 17, prompt="x")
except openai.BadRequestError as error:
    assert "16" in error.message, error
else:
    raise SystemExit("17 pictures were accepted")
try:
    openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).images.generate(prompt="x")
except openai.AuthenticationError:
    pass
else:
    raise SystemExit("a wrong key was accepted")
