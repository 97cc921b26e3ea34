"""Prepares a release, and prints the notes of one.

    python .github/release.py prepare 1.2.3     # writes the version wherever it stands, and its section of CHANGELOG.md
    python .github/release.py notes v1.2.3      # prints that section; status 1 if the tag is not the code's version

CONTRIBUTING.md has the whole procedure; `.github/workflows/release.yml` runs the second command for a pushed tag.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = "deployments/__init__.py"
CHANGELOG = "CHANGELOG.md"
_TAGGED = re.compile(r"(ghcr\.io/sdgraph/[\w-]+):\d+\.\d+\.\d+")


def version(root: Path = ROOT) -> str:
    """The version of the code. ValueError if the file does not say it."""
    found = re.search(r'^__version__ = "(.*)"$', (root / VERSION).read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{VERSION} has no __version__")
    return found[1]


def prepare(new: str, day: datetime.date, root: Path = ROOT) -> list[str]:
    """Write version `new` into the code, the manifests and the changelog.

    Args:
        new: such as `1.2.3`.
        day: of the release, for the changelog.
        root: of the checkout.

    Returns:
        The files that changed.

    Raises:
        ValueError: `new` is not a version above the present one, or nothing is unreleased.
    """
    old = version(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+", new) or _numbers(new) <= _numbers(old):
        raise ValueError(f"{new!r} is not a version above {old}: three numbers, such as 1.2.3")
    changelog = (root / CHANGELOG).read_text()
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if unreleased is None or not unreleased[1].strip():
        raise ValueError(f"{CHANGELOG} has nothing under [Unreleased]")
    texts = {
        CHANGELOG: changelog.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{new}] - {day.isoformat()}\n", 1),
        VERSION: (root / VERSION).read_text().replace(f'"{old}"', f'"{new}"'),
    }
    for path in sorted((root / "k8s").rglob("*")):
        if path.suffix in (".yaml", ".md") and _TAGGED.search(text := path.read_text()):
            texts[str(path.relative_to(root))] = _TAGGED.sub(rf"\1:{new}", text)
    for name, text in texts.items():
        (root / name).write_text(text)
    return sorted(texts)


def notes(tag: str, root: Path = ROOT) -> str:
    """The changelog's section of a version. ValueError if `tag` is not the code's version, or has no section."""
    if tag != f"v{version(root)}":
        raise ValueError(f"the tag is {tag}, and {VERSION} says {version(root)}")
    section = re.search(
        rf"^## \[{re.escape(version(root))}\].*?\n(.*?)(?=^## \[|\Z)",
        (root / CHANGELOG).read_text(),
        re.MULTILINE | re.DOTALL,
    )
    if section is None:
        raise ValueError(f"{CHANGELOG} has no section [{version(root)}]")
    return section[1].strip()


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split(".")))


def main(arguments: list[str]) -> None:
    """One of the two commands; anything else prints how they are called."""
    try:
        match arguments:
            case ["prepare", new]:
                changed = prepare(new, datetime.datetime.now(tz=datetime.UTC).date())
                print(f"changed: {' '.join(changed)}")
                print(f"next: git commit -am 'release: {new}' && git tag v{new} && git push origin HEAD v{new}")
            case ["notes", tag]:
                print(notes(tag))
            case _:
                sys.exit(__doc__)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
