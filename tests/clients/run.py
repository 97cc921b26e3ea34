"""Other people's clients against a running graph: each from PyPI in a venv of its own, pointed at our server.

    make clients        # or: python tests/clients/run.py [llm-hyperbolic] [huggingface_hub]

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

CLIENTS = {
    "llm-hyperbolic": (["llm-hyperbolic==0.4.9", "requests"], LLM_HYPERBOLIC),
    "huggingface_hub": (["huggingface_hub==1.21.0", "pillow"], HUGGINGFACE_HUB),
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
