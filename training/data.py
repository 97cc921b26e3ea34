"""The sprites: 3D emoji of animals, plants, food, vehicles and things, with their names.

Two npm packages, fetched by name at training time at pinned versions and checked against their checksums and the
licence they must carry. Only weights made from them are ever committed.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "training"
SPRITE = 256


@dataclass(frozen=True)
class Package:
    """An npm package at a pinned version, its tarball's SHA-256 and the licence its manifest must state."""

    name: str
    version: str
    sha256: str
    licence: str = "MIT"

    @property
    def tarball(self) -> str:
        """The name `npm pack` gives the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJI = Package("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58")
NAMES = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
# emojibase's groups: animals and nature, food and drink, travel and places, activities, objects.
GROUPS = range(3, 8)


class DataError(RuntimeError):
    """A package is missing, is not the one that was pinned, or carries another licence."""


def fetch(package: Package) -> Path:
    """The package's tarball, downloaded once.

    Raises:
        DataError: npm failed, or the checksum or the licence differs from what is pinned.
    """
    folder = BUILD / "packages"
    path = folder / package.tarball
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"{package.name}@{package.version}"
        done = subprocess.run(["npm", "pack", wanted], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"npm pack {wanted} failed: {done.stderr.strip()[-300:]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DataError(f"{path.name} has SHA-256 {digest}, pinned is {package.sha256}")
    with tarfile.open(path) as archive:
        manifest = json.load(archive.extractfile("package/package.json"))
    if manifest.get("license") != package.licence:
        raise DataError(f"{package.name} carries the licence {manifest.get('license')!r}, expected {package.licence!r}")
    return path


@dataclass(frozen=True)
class Sprites:
    """Pictures uint8 [n, 4, 256, 256] (RGBA, straight alpha) and their names, sorted by name."""

    pictures: Tensor
    names: tuple[str, ...]

    def named(self, names: list[str]) -> Tensor:
        """The pictures of `names`, in that order, colours premultiplied by alpha, float [n, 4, 256, 256] in 0..1."""
        return premultiplied(self.pictures[[self.names.index(name) for name in names]])


def premultiplied(pictures: Tensor) -> Tensor:
    """RGBA bytes to floats in 0..1 whose colours are multiplied by alpha, so that they can be resampled."""
    pictures = pictures.float() / 255
    return torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], 1)


def load_sprites() -> Sprites:
    """Every usable sprite; the first call fetches the packages and writes a cache."""
    cache = BUILD / "sprites.pt"
    if not cache.exists():
        with tarfile.open(fetch(NAMES)) as archive:
            entries = json.load(archive.extractfile("package/en/data.json"))
        names = {_code(e["hexcode"]): e["label"] for e in entries if e.get("group") in GROUPS}
        found: dict[str, np.ndarray] = {}
        with tarfile.open(fetch(EMOJI)) as archive:
            for member in archive:
                name = names.get(_code(Path(member.name).stem))
                if name and member.name.endswith(".webp"):
                    picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
                    found[name] = np.asarray(picture.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
        ordered = sorted(found)
        pictures = torch.from_numpy(np.stack([found[name] for name in ordered])).permute(0, 3, 1, 2).contiguous()
        torch.save({"pictures": pictures, "names": ordered}, cache)
    saved = torch.load(cache)
    return Sprites(saved["pictures"], tuple(saved["names"]))


def _code(hexcode: str) -> str:
    """An emoji's code points without the variation selector, which the two packages use differently."""
    return hexcode.lower().replace("-fe0f", "")
