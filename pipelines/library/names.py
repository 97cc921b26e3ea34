"""Public names, unique without regard to case: the catalog's first, then the library's in their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from pipelines.library.files import LibraryFile


class Names:
    """Names that are taken, and by whom."""

    def __init__(self, taken: Iterable[str]) -> None:
        """Begin with the catalog's."""
        self._owners = {name.strip().casefold(): "the catalog" for name in taken}

    def claim(self, file: LibraryFile) -> str | None:
        """Reserve the names of a file; returns the reason if one is taken, else None."""
        names = [file.name, *file.override.aliases]
        for name in names:
            if (owner := self._owners.get(name.strip().casefold())) is not None:
                return f"the name '{name}' is {owner}'s; say another `name` in a .yaml of its stem beside it"
        self._owners |= {name.strip().casefold(): file.path for name in names}
        return None


def slug(name: str, taken: Set[str], kinds: tuple[str, ...]) -> str:
    """A name as ids of components spell it, so that `<kind>-<slug>` is none of those taken."""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.casefold()).strip("-.") or "model"
    slugs = (plain if n == 1 else f"{plain}-{n}" for n in range(1, len(taken) + 2))
    return next(s for s in slugs if not taken & {f"{kind}-{s}" for kind in kinds})
