"""Folders of files as people have them, made of the tiny models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from config.catalog import Catalog
from pipelines.library.equality import Digests
from pipelines.library.library import Library, extend

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def put(source: Path, file: Path) -> Path:
    """Copy a file into a library as one that was there before: nobody need wait until it has settled."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, file)
    return settled(file)


def write(file: Path, data: bytes | str) -> Path:
    """The same of a file with this content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return settled(file)


def settled(file: Path) -> Path:
    """Make a file a minute older than it is."""
    then = file.stat().st_mtime - 60
    os.utime(file, (then, then))
    return file


def extended(catalog: Catalog, folders: Sequence[Path], memory: Path) -> Catalog:
    """The catalog with the models of folders, whose digests are remembered in the file `memory`."""
    return extend(catalog, folders, Digests(memory))


def read(catalog: Catalog, folder: Path, memory: Path) -> Catalog:
    """The catalog with the models and the LoRAs of a folder."""
    return Library(extended(catalog, [folder], memory)).read()


def reasons(catalog: Catalog) -> dict[str, str]:
    """File -> why nothing is served of it."""
    return {entry.file: entry.reason for entry in catalog.unserved}
