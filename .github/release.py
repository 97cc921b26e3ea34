"""Prints the section of CHANGELOG.md for a tag: `python .github/release.py v1.2.3`; status 1 if it is no release."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str) -> str:
    """What CHANGELOG.md says of a version. ValueError where the tag is not the code's version, or has no section."""
    found = re.search(r'__version__ = "(.*)"', (ROOT / "deployments/__init__.py").read_text())
    version = found[1] if found else None
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, and deployments/__init__.py says {version}")
    section = re.search(
        rf"^## \[{re.escape(str(version))}\].*?\n(.*?)(?=^## \[|\Z)",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    if section is None:
        raise ValueError(f"CHANGELOG.md has no section [{version}]")
    return section[1].strip()


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
