"""What an ingress allows a request, what it signs pictures with, and where it puts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.planning import PlanLimits


@dataclass(frozen=True)
class IngressLimits:
    """What the ingress allows, from the settings."""

    plan: PlanLimits
    max_body_bytes: int
    max_image_pixels: int
    deadline_s: float
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may read replies; `*` for any."""


@dataclass(frozen=True)
class SigningFiles:
    """What pictures are signed with."""

    certificates: Path
    private_key: Path
    timestamp_url: str | None = None


@dataclass(frozen=True)
class LinkStore:
    """Where pictures lie that are sent as links."""

    address: str = field(repr=False)
    """`s3://bucket/folder`, `gs://...` or `az://...`; credentials are in the environment."""
    lifetime_s: int
    """Seconds that a link is good for."""
