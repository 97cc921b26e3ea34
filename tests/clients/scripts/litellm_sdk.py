"""LiteLLM with an OpenAI-compatible server: pictures and edits."""

import base64
import os
import sys
from pathlib import Path

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its prices would come from GitHub
import litellm

url, key, folder = sys.argv[1:]
server = {"api_base": f"{url}/v1", "api_key": key, "max_retries": 0}
small = {"size": "256x256", "seed": 7}

reply = litellm.image_generation(
    model="openai/SD1.5", prompt="a penguin in the snow", n=2, num_inference_steps=8, **small, **server
)
assert len(reply.data) == 2, reply
generated = Path(folder) / "generated.png"
generated.write_bytes(base64.b64decode(reply.data[0].b64_json))
assert reply.usage.total_tokens == 0, reply.usage

named = litellm.image_generation(model="openai/dall-e-3", prompt="a penguin", steps=8, **small, **server)
(Path(folder) / "named.png").write_bytes(base64.b64decode(named.data[0].b64_json))

with generated.open("rb") as image:
    edited = litellm.image_edit(
        model="openai/gpt-image-1", image=image, prompt="a cat", size="256x256", extra_body={"steps": 8}, **server
    )
(Path(folder) / "edited.png").write_bytes(base64.b64decode(edited.data[0].b64_json))

try:
    litellm.image_generation(model="openai/SD1.5", prompt="a penguin", size="9x9", **server)
except litellm.BadRequestError as error:
    assert "size" in str(error), error
else:
    raise SystemExit("a size of 9x9 was accepted")
