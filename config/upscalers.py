"""The names of methods and models that enlarge pictures."""

from __future__ import annotations

from collections.abc import Mapping

from config.sources import Spec

LATENT_METHODS: Mapping[str, tuple[str, bool]] = {
    "latent": ("bilinear", False),
    "latent-antialiased": ("bilinear", True),
    "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True),
    "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}
"""Of a second pass alone; latents are interpolated: torch's mode, and whether it is antialiased."""
PICTURE_METHODS = ("lanczos", "nearest")
"""A picture is resized by Pillow."""
A1111_NAMES: Mapping[str, str] = {
    "latent": "Latent",
    "latent-antialiased": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
METHOD_ALIASES = {theirs: ours for ours, theirs in A1111_NAMES.items()} | {"None": "lanczos"}
"""A1111's spellings; its "None" resizes by Lanczos."""


class UpscalerSpec(Spec):
    """A model that enlarges pictures."""

    name: str
    aliases: tuple[str, ...] = ()
    component: str
