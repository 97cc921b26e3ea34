"""A Hugging Face cache that already holds tiny components under the hub catalog's repository names and revisions."""

from __future__ import annotations

import shutil
from pathlib import Path

from config.catalog import Catalog
from config.sources import HubSource
from models import make_tiny

FOLDERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "sdxl-refiner",
    "stabilityai/sdxl-turbo": "sdxl-turbo",
    "segmind/SSD-1B": "ssd",
}


def fill(home: Path, tiny: Path) -> Path:
    """Write `home`/hub as `huggingface_hub` would after downloading; returns `home`.

    The catalog promises multiples of 8, as the real VAEs take, so VAEs and ControlNets have the real downscale of 8.
    """
    catalog = Catalog.load("hub")
    for component in catalog.components:
        assert isinstance(component.source, HubSource)
        repo, revision, variant = component.source.repo, component.source.revision, component.source.variant
        snapshot = home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
        if snapshot.exists():
            continue
        if repo == "madebyollin/sdxl-vae-fp16-fix":
            make_tiny.seeded(41, make_tiny.vae((8, 8, 16, 16), 4, 1024, 0.13025)).save_pretrained(snapshot)
            continue
        if component.union:
            make_tiny.controlnet_union((8, 8, 8, 16)).save_pretrained(snapshot)
            continue
        folder = "controlnet-sd15-canny" if component.kind == "controlnet" else FOLDERS[repo]
        shutil.copytree(tiny / folder, snapshot)
        if folder == "sd2":
            make_tiny.seeded(42, make_tiny.vae((8, 8, 16, 16), 8, 768, 0.18215)).save_pretrained(snapshot / "vae")
        if variant:
            for file in [*snapshot.glob("*.safetensors"), *snapshot.glob("*/*.safetensors")]:
                file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))
    return home
