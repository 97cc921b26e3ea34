"""The tiny upscalers, in a catalog and by spandrel's own call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from config.catalog import Catalog
from pipelines.spandrel_compat import load_spandrel

X4, X2 = "Tiny x4", "Tiny x2"
FILE = "model.safetensors"


def with_upscalers(catalog: Catalog, tiny: Path) -> Catalog:
    """The catalog with both."""
    data = catalog.model_dump()
    for name in (X4, X2):
        component = {"id": f"upscaler-{name[-2:]}", "kind": "upscaler", "file": FILE}
        data["components"] += ({"source": {"folder": tiny / component["id"]}} | component,)
        data["upscalers"] += ({"name": name, "component": component["id"], "aliases": (f"Mini {name[-2:]}",)},)
    return Catalog.model_validate(data)


@torch.inference_mode()
def by_spandrel(file: Path, image: Image.Image) -> Image.Image:
    """A picture, by one call of spandrel's own over all of it."""
    model = load_spandrel().ModelLoader().load_from_state_dict(load_file(file)).eval()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    larger = model(pixels)[0].permute(1, 2, 0).clamp(0, 1)
    return Image.fromarray((larger * 255).round().to(torch.uint8).numpy())
