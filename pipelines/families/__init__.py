"""What differs between model families, and only that."""

from __future__ import annotations

from pipelines.families.base import Family
from pipelines.families.sd import SDFamily
from pipelines.families.sdxl import SDXLFamily

FAMILIES: dict[str, Family] = {"sd": SDFamily(), "sdxl": SDXLFamily()}

__all__ = ["FAMILIES", "Family"]
