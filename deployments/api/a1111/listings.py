"""The lists that A1111's clients read: models, samplers, LoRAs and the rest."""

from __future__ import annotations

from typing import Any

from config.catalog import Catalog
from config.components import ComponentSpec
from config.sources import CheckpointSource, FolderSource
from config.upscalers import A1111_NAMES, LATENT_METHODS, PICTURE_METHODS
from deployments.api.a1111.checkpoints import short_hash, title
from pipelines.sampling.a1111 import SCHEDULES, their_samplers

Listing = list[dict[str, Any]]


def sd_models(catalog: Catalog) -> Listing:
    """Models that are served, by their public names."""
    return [
        {
            "title": title(model, catalog),
            "model_name": model.name,
            "hash": short_hash(model, catalog),
            "sha256": None,
            "filename": _place(catalog.component(model.unet)),
            "config": None,
        }
        for model in catalog.available_models()
    ]


def _place(component: ComponentSpec) -> str:
    """Where weights lie, without this machine's folders."""
    match component.source:
        case FolderSource(folder=folder):
            return folder.name
        case CheckpointSource(checkpoint=checkpoint):
            return checkpoint.name
        case source:
            return source.repo


def samplers() -> Listing:
    """Solvers by A1111's names; ours are aliases where they differ."""
    return [
        {"name": theirs, "aliases": [ours] if ours != theirs else [], "options": {}}
        for theirs, ours in their_samplers().items()
    ]


def schedulers() -> Listing:
    """Schedule types."""
    return [
        {
            "name": name,
            "label": label,
            "aliases": None,
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": False,
        }
        for name, label in SCHEDULES.items()
    ]


def upscalers(catalog: Catalog) -> Listing:
    """The upscalers of pictures: Pillow's methods, then models."""
    nothing = dict.fromkeys(("model_name", "model_path", "model_url"))
    names = ["None", *(A1111_NAMES[m] for m in PICTURE_METHODS), *(entry.name for entry in catalog.upscalers)]
    return [{"name": name, **nothing, "scale": 4} for name in names]


def latent_upscale_modes() -> Listing:
    """The methods that enlarge latents between the passes of `enable_hr`."""
    return [{"name": A1111_NAMES[method]} for method in LATENT_METHODS]


def loras(catalog: Catalog) -> Listing:
    """LoRAs that are served: prompts say them as `<lora:name:weight>`."""
    return [
        {
            "name": lora.name,
            "alias": lora.aliases[0] if lora.aliases else lora.name,
            "path": lora.weights[0].file,
            "metadata": {"bases": ", ".join(lora.bases)} | ({"trigger": lora.trigger} if lora.trigger else {}),
        }
        for lora in catalog.loras
        if lora.unavailable is None
    ]


def embeddings(catalog: Catalog) -> dict[str, dict[str, Any]]:
    """Textual inversions: prompts say them as `<name>`. Their training is not known."""
    unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
    told: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for entry in catalog.embeddings:
        told["skipped" if entry.unavailable else "loaded"][entry.name] = unknown
    return told


def sd_vae(catalog: Catalog) -> Listing:
    """VAEs of the models that are served; each goes with its own model."""
    used = dict.fromkeys(model.vae for model in catalog.available_models())
    return [{"model_name": vae, "filename": _place(catalog.component(vae))} for vae in used]


def prompt_styles(catalog: Catalog) -> Listing:
    """Styles with their texts."""
    return [
        {"name": style.name, "prompt": style.prompt, "negative_prompt": style.negative_prompt}
        for style in catalog.styles
    ]


SCRIPTS = ["controlnet", "controlnet m2m"]
