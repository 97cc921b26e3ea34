"""llm-hyperbolic, whose address is fixed in its code: its user can only set it on the model."""

import glob
import shutil
import sys

from llm_hyperbolic import HyperbolicImage

url, key, folder = sys.argv[1:]
model = HyperbolicImage("hyperbolic/SDXL1.0-base")
model.api_base = f"{url}/v1/image/generation"
model.key = key
print(model.prompt("a photo of an astronaut", height=256, width=256, steps=8, seed=7, cfg_scale=5.0))
shutil.move(glob.glob("*.png")[0], f"{folder}/astronaut.png")
