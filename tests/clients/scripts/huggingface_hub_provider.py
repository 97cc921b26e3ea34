"""The last huggingface_hub that had Hyperbolic as a provider.

It asks the hub which models the provider has; here that table is given.
"""

import sys

from huggingface_hub import InferenceClient
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING

url, key, folder = sys.argv[1:]
name = "stabilityai/stable-diffusion-xl-base-1.0"
HARDCODED_MODEL_INFERENCE_MAPPING["hyperbolic"] = {
    name: InferenceProviderMapping(
        provider="hyperbolic", hf_model_id=name, providerId="SDXL1.0-base", status="live", task="text-to-image"
    )
}
PROVIDERS["hyperbolic"]["text-to-image"].base_url = url
client = InferenceClient(provider="hyperbolic", api_key=key)
small = {"width": 256, "height": 256, "num_inference_steps": 8, "guidance_scale": 4.0, "seed": 7}
client.text_to_image("a photo of an astronaut", model=name, **small).save(f"{folder}/astronaut.png")
