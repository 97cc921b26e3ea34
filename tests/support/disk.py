"""A small disk that can be full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def why_no_disk() -> str | None:
    """Why this user cannot have one; None if it can."""
    return None if os.geteuid() == 0 and shutil.which("mount") else "mounting a small disk needs root"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own under `folder`, of a size such as `64k`, until the block ends."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until the disk of `folder` is full; the file that fills it."""
    file = folder / "full"
    with file.open("wb", buffering=0) as written:
        for size in (2**20, 2**10, 1):
            with suppress(OSError):
                while written.write(b"." * size):
                    pass
    return file
