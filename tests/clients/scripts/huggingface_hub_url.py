"""Today's huggingface_hub, pointed at the URL of a model: pictures, changed pictures, errors."""

import io
import sys

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

url, key, folder = sys.argv[1:]
client = InferenceClient(model=f"{url}/models/SD1.5", token=key)
size = {"width": 256, "height": 256}

image = client.text_to_image("an apple on a teal background", num_inference_steps=8, guidance_scale=4.0, seed=2, **size)
image.save(f"{folder}/apple.png")

given = io.BytesIO()
image.save(given, "PNG")
changed = client.image_to_image(given.getvalue(), "a cat", strength=0.7, num_inference_steps=8, target_size=size)
changed.save(f"{folder}/cat.png")

try:
    client.text_to_image("x", width=100000)
except HfHubHTTPError as error:
    assert error.response.status_code == 400, error
else:
    raise SystemExit("a width of 100000 was accepted")
