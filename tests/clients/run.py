"""Other people's clients against a running graph: each from PyPI in a venv of its own, pointed at our server.

    make clients        # or: python tests/clients/run.py [llm-hyperbolic] [openai] [huggingface_hub] ...

Not part of `make test`: it installs packages that this project does not depend on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from deployments.launcher import LOCAL_CONFIG, running_graph

# What the client's own user would write; argv: base URL, where to leave the picture.
LLM_HYPERBOLIC = """
import glob, shutil, sys
url, target = sys.argv[1:]
from llm_hyperbolic import HyperbolicImage
model = HyperbolicImage("hyperbolic/SDXL1.0-base")
model.api_base = f"{url}/v1/image/generation"
model.key = "any"
print(model.prompt("a photo of an astronaut", height=256, width=256, steps=8, seed=7, cfg_scale=5.0))
shutil.move(glob.glob("*.png")[0], target)
"""

HUGGINGFACE_HUB = """
import sys
url, target = sys.argv[1:]
from huggingface_hub import InferenceClient
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING
name = "stabilityai/stable-diffusion-xl-base-1.0"
HARDCODED_MODEL_INFERENCE_MAPPING["hyperbolic"] = {name: InferenceProviderMapping(
    provider="hyperbolic", hf_model_id=name, providerId="SDXL1.0-base", status="live", task="text-to-image")}
PROVIDERS["hyperbolic"]["text-to-image"].base_url = url
client = InferenceClient(provider="hyperbolic", api_key="any")
image = client.text_to_image("a photo of an astronaut", model=name, seed=7, num_inference_steps=8, guidance_scale=4.0)
image.save(target)
"""

HUGGINGFACE_HUB_URL = """
import io, sys
url, target = sys.argv[1:]
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
client = InferenceClient(model=f"{url}/models/SD1.5", token="any")
size = {"width": 256, "height": 256}
few = {"num_inference_steps": 8, "guidance_scale": 4.0, "seed": 2}
image = client.text_to_image("an apple on a teal background", **few, **size)
assert image.size == (256, 256)
given = io.BytesIO()
image.save(given, "PNG")
changed = client.image_to_image(given.getvalue(), "a cat", strength=0.7, num_inference_steps=8, target_size=size)
changed.save(target)
try:
    client.text_to_image("x", width=100000)
except HfHubHTTPError as error:
    assert error.response.status_code == 400, error
else:
    raise SystemExit("a wrong width was accepted")
"""

OPENAI = """
import base64, io, sys
url, target = sys.argv[1:]
import openai
client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
few = {"steps": 8, "seed": 7}

reply = client.images.generate(prompt="a penguin in the snow", n=2, size="256x256", extra_body=few)
assert [item.seed for item in reply.data] == [7, 8], reply.data
assert (reply.size, reply.output_format, reply.usage.total_tokens) == ("256x256", "png", 0)
first = base64.b64decode(reply.data[0].b64_json)
assert first.startswith(b"\\x89PNG")

asked = dict(model="dall-e-3", prompt="a penguin", size="256x256", response_format="url", quality="standard")
link = client.images.generate(**asked, extra_body=few).data[0].url
assert link.startswith("data:image/png;base64,"), link[:40]

told = list(client.images.generate(
    model="gpt-image-1", prompt="a penguin", size="256x256", stream=True, partial_images=2, extra_body=few))
assert [e.type for e in told] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], told
assert [e.partial_image_index for e in told[:2]] == [0, 1]
assert told[-1].usage.input_tokens_details.text_tokens == 0

few = {**few, "strength": "0.7"}
edited = client.images.edit(image=("a.png", first), prompt="a cat", size="256x256", extra_body=few)
told = list(client.images.edit(
    image=[("a.png", first)], prompt="a cat", stream=True, partial_images=1, extra_body=few))
assert [e.type for e in told] == ["image_edit.partial_image", "image_edit.completed"], told

try:
    client.images.generate(prompt="x", background="transparent")
except openai.BadRequestError as error:
    assert (error.param, error.code, "['auto', 'opaque']" in error.message) == ("background", "40302", True), error
else:
    raise SystemExit("a transparent background was accepted")
try:
    client.images.edit(image=[("a.png", first)] * 17, prompt="x")
except openai.BadRequestError as error:
    assert "16" in error.message
else:
    raise SystemExit("17 pictures were accepted")
open(target, "wb").write(base64.b64decode(edited.data[0].b64_json))
"""

WEBUIAPI = Path(__file__).with_name("webuiapi_client.py").read_text()

CLIENTS = {
    "llm-hyperbolic": (["llm-hyperbolic==0.4.9", "requests"], LLM_HYPERBOLIC),
    "openai": (["openai==3.57.0"], OPENAI),
    "huggingface_hub-url": (["huggingface_hub==2.4.0", "pillow"], HUGGINGFACE_HUB_URL),
    "huggingface_hub": (["huggingface_hub==1.21.0", "pillow"], HUGGINGFACE_HUB),
    "webuiapi": (["webuiapi==0.9.17", "requests", "pillow"], WEBUIAPI),
}


def main(names: list[str]) -> None:
    """Run every named client; the first that gets no picture ends the script with its error."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as scratch, running_graph(LOCAL_CONFIG) as url:
        for name in names:
            packages, script = CLIENTS[name]
            home = Path(scratch) / name
            venv.create(home, with_pip=True)
            python = home / "bin" / "python"
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            picture = home / "picture.png"
            subprocess.run([python, "-c", script, url, picture], check=True, cwd=home, env={"HOME": str(home)})
            with Image.open(picture) as image:
                image.load()
                print(f"{name}: {image.format} {image.size[0]}x{image.size[1]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CLIENTS))
