"""A read-only volume that can be made to hang, as a network's does when its server is away (FUSE).

python -m tests.support.volume SOURCE MOUNT     # serves SOURCE under MOUNT until it is killed
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from config.catalog import ROOT


def why_not() -> str | None:
    """Why this machine cannot have one; None if it can."""
    if not os.access("/dev/fuse", os.W_OK):
        return "no /dev/fuse that this user may write"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"no FUSE: {error}"
    return None


@contextmanager
def hanging_volume(source: Path, mount: Path) -> Iterator[psutil.Process]:
    """`source` under `mount` until the block ends; while the process is suspended, whoever asks it waits."""
    mount.mkdir()
    server = subprocess.Popen([sys.executable, "-m", __name__, str(source), str(mount)], cwd=ROOT)
    try:
        while not mount.is_mount():
            assert server.poll() is None, "the volume's server ended"
            time.sleep(0.05)
        yield psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def main(source: str, mount: str) -> None:
    """Serve until killed."""
    from mfusepy import FUSE, FuseOSError, Operations

    class Volume(Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
            try:
                status = os.lstat(source + path)
            except FileNotFoundError:
                raise FuseOSError(errno.ENOENT) from None
            names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
            times = {f"st_{kind}time": getattr(status, f"st_{kind}time_ns") for kind in "acm"}
            return {name: getattr(status, name) for name in names} | times

        def readdir(self, path: str, fh: Any) -> list[str]:
            return [".", "..", *os.listdir(source + path)]

        def open(self, path: str, flags: int) -> int:
            return os.open(source + path, flags)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(fh, size, offset)

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

    # The kernel remembers nothing of names and attributes, as with a network's volume that was not asked for a while.
    FUSE(Volume(), mount, foreground=True, ro=True, attr_timeout=0, entry_timeout=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
