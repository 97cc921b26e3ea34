"""What an ingress allows a request, and what it signs pictures with."""

from __future__ import annotations

from dataclasses import dataclass
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
