"""The sprites: emoji of animals, plants, food, vehicles and things, soft 3D and flat, with their names.

Three npm packages, fetched by name at training time at pinned versions and checked against their checksums and the
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
from typing import IO

import numpy as np
import resvg_py
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
FLAT = Package(
    "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
)
# emojibase's groups: animals and nature, food and drink, travel and places, activities, objects.
GROUPS = range(3, 8)
PEOPLE = ("astronaut",)
"""The people who are known: nobody's face."""


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
        manifest = json.load(_member(archive, "package/package.json"))
    if manifest.get("license") != package.licence:
        raise DataError(f"{package.name} carries the licence {manifest.get('license')!r}, expected {package.licence!r}")
    return path


@dataclass(frozen=True)
class Sprites:
    """Pictures uint8 [n, 4, 256, 256] (RGBA, straight alpha) and their names, sorted by name.

    `pictures` are soft 3D; `flat` are the same things in flat colours, empty where the package has none.
    """

    pictures: Tensor
    flat: Tensor
    names: tuple[str, ...]

    def named(self, names: list[str]) -> Tensor:
        """The soft pictures of `names`, then the flat ones, in that order, float [2 n, 4, 256, 256] in 0..1.

        Colours are multiplied by alpha.
        """
        rows = [self.names.index(name) for name in names]
        return premultiplied(torch.cat([self.pictures[rows], self.flat[rows]]))

    def everything(self) -> Tensor:
        """Every picture there is, as in `named`."""
        some = self.flat[:, 3].flatten(1).any(1)
        return premultiplied(torch.cat([self.pictures, self.flat[some]]))


def premultiplied(pictures: Tensor) -> Tensor:
    """RGBA bytes to floats in 0..1 whose colours are multiplied by alpha, so that they can be resampled."""
    pictures = pictures.float() / 255
    return torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], 1)


def load_sprites() -> Sprites:
    """Every usable sprite; the first call fetches the packages and writes a cache."""
    cache = BUILD / "sprites-soft-and-flat.pt"
    if not cache.exists():
        with tarfile.open(fetch(NAMES)) as archive:
            entries = json.load(_member(archive, "package/en/data.json"))
        names = {_code(e["hexcode"]): e["label"] for e in entries if e.get("group") in GROUPS or e["label"] in PEOPLE}
        soft: dict[str, np.ndarray] = {}
        with tarfile.open(fetch(EMOJI)) as archive:
            for member in archive:
                name = names.get(_code(Path(member.name).stem))
                if name and member.name.endswith(".webp"):
                    picture = Image.open(io.BytesIO(_member(archive, member).read())).convert("RGBA")
                    soft[name] = np.asarray(picture.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
        ordered = sorted(soft)
        flat = _flat_pictures(ordered)
        stacked = [torch.from_numpy(np.stack([kind[name] for name in ordered])) for kind in (soft, flat)]
        pictures = [kind.permute(0, 3, 1, 2).contiguous() for kind in stacked]
        torch.save({"pictures": pictures[0], "flat": pictures[1], "names": ordered}, cache)
    saved = torch.load(cache)
    return Sprites(saved["pictures"], saved["flat"], tuple(saved["names"]))


def _member(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> IO[bytes]:
    """An open file of an archive."""
    file = archive.extractfile(member)
    assert file is not None, f"{member} is not a file"
    return file


def _flat_pictures(names: list[str]) -> dict[str, np.ndarray]:
    """The flat emoji of `names`, [256, 256, 4] each, drawn from their SVG; empty ones where there is no such emoji."""
    with tarfile.open(fetch(FLAT)) as archive:
        icons = json.load(_member(archive, "package/icons.json"))
    box = f"0 0 {icons.get('width', 32)} {icons.get('height', 32)}"
    found = {}
    for name in names:
        icon = icons["icons"].get(name.lower().replace(" ", "-"))
        body = icon["body"] if icon else ""
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{SPRITE}" height="{SPRITE}">{body}</svg>'
        drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE)
        found[name] = np.asarray(Image.open(io.BytesIO(bytes(drawn))).convert("RGBA"))
    return found


def _code(hexcode: str) -> str:
    """An emoji's code points without the variation selector, which the two packages use differently."""
    return hexcode.lower().replace("-fe0f", "")
