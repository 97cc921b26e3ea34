"""Values a request may not have: fields, the parameter that is named, and what the message says of it."""

from __future__ import annotations

import base64
from typing import Any

from tests.support.http import blank

CONTROL = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny", "controlnet_image": blank(8, 8)}

VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"sampler": "Euler b"}, "sampler", "Did you mean 'Euler"),
    ({"style_preset": "Watercolr"}, "style_preset", "Did you mean 'Watercolor'?"),
    ({"backend": "onnx"}, "backend", "['auto', 'tvm', 'torch']"),
    ({"backend": "tvm"}, "backend", "'512x512'"),
    ({"backend": "tvm", "width": 512, "height": 768}, "backend", "not compiled"),
    ({"width": 132}, "width", "[128, 136]"),
    ({"height": 64}, "height", "128"),
    ({"width": 2504}, "width", "2496"),
    ({"steps": 0}, "steps", "1"),
    ({"steps": 1001}, "steps", "1000"),
    ({"sampler": "DDIM", "steps": 1000}, "steps", "1 to 999"),
    ({"sampler": "UniPC 2M", "steps": 769}, "steps", "1 to 768"),
    ({"sampler": "LCM", "steps": 51}, "steps", "1 to 50"),
    ({"sampler": "EDM_Euler"}, "sampler", "cannot serve this model"),
    ({"cfg_scale": 50.5}, "cfg_scale", "50"),
    ({"cfg_scale": -1}, "cfg_scale", "0"),
    ({"strength": 1.5}, "strength", "1"),
    ({"image": blank(64, 64), "strength": 0.1}, "strength", "at least 0.3334"),
    ({"seed": -2}, "seed", "-1"),
    ({"seed": 2**32}, "seed", "4294967296"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": "x" * 20_001}, "prompt", "20000"),
    ({"prompt_2": "x"}, "prompt_2", "SD1.5"),
    ({"negative_prompt_2": "x"}, "negative_prompt_2", "SD1.5"),
    ({"prompt_syntax": "compel"}, "prompt_syntax", "['plain', 'weighted']"),
    ({"emphasis": "Orginal"}, "emphasis", "Did you mean 'Original'?"),
    ({"long_prompt": "drop"}, "long_prompt", "['chunk', 'cut']"),
    ({"clip_skip": 0}, "clip_skip", "1"),
    ({"clip_skip": 13}, "clip_skip", "12"),
    ({"clip_skip": 4}, "clip_skip", "1 to 3"),
    ({"prompt_syntax": "weighted", "prompt": "a (cat:1e9)(dog:1000000000)"}, "prompt", "-100 to 100"),
    ({"prompt_syntax": "weighted", "negative_prompt": "(" * 10_000 + "fog"}, "negative_prompt", "-100 to 100"),
    ({"prompt_syntax": "weighted", "prompt": "a cat <lora:Pixel_Art:strong>"}, "prompt", "<lora:name:weight>"),
    ({"prompt_syntax": "weighted", "prompt": "a cat <lora:Nope:1>"}, "loras", "Nope"),
    ({"prompt": "a, " * 700}, "prompt", "16 chunks"),
    ({"guidance_rescale": 1.5}, "guidance_rescale", "1"),
    ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_end", "no step after"),
    ({"guidance_start": -0.1}, "guidance_start", "0"),
    ({"eta": 0.5, "sampler": "Euler a"}, "eta", "only ['DDIM']"),
    ({"eta": 2, "sampler": "DDIM"}, "eta", "1"),
    ({"enable_refiner": True}, "enable_refiner", "no refiner"),
    ({"controlnet_name": "canny"}, "controlnet_name", "no ControlNet"),
    ({"controlnet_image": blank(8, 8)}, "controlnet_image", "no ControlNet"),
    ({"loras": {"Nope": 1.0}}, "loras", "Nope"),
    ({"loras": {"Logo": 1.0}}, "loras", "no tiny weights"),
    ({"model_name": "SD1.5-ControlNet"}, "controlnet_name", "required"),
    ({"model_name": "SD1.5-ControlNet", "controlnet_name": "canny"}, "controlnet_image", "required"),
    (
        CONTROL | {"controlnet_name": "cany"},
        "controlnet_name",
        "Unexpected controlnet_name 'cany'. Did you mean 'canny'?",
    ),
    (CONTROL | {"controlnet_image": "x"}, "controlnet_image", "base64"),
    (CONTROL | {"controlnet_image": blank(300, 300)[:80]}, "controlnet_image", "damaged"),
    ({"image": "%%%"}, "image", "base64"),
    ({"image": "=="}, "image", "empty"),
    ({"image": base64.b64encode(b"no picture").decode()}, "image", "PNG"),
    ({"image": blank(300, 300)[:80]}, "image", "damaged"),
    ({"output_format": "tiff"}, "output_format", "jpeg"),
    ({"width": 2496, "height": 2496, "steps": 1000, "sampler": "Euler"}, "steps", "budget"),
]
