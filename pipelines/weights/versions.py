"""Which version of a file it is, where files may be replaced while a graph runs."""

from __future__ import annotations

from pathlib import Path


def version_of(file: Path) -> str:
    """Changes when a file, or one below a folder, does; empty if there is none."""
    try:
        if file.is_dir():
            parts = [part.stat() for part in sorted(file.rglob("*")) if part.is_file()]
            return f"{sum(part.st_size for part in parts)}-{max((part.st_mtime_ns for part in parts), default=0)}"
        status = file.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
