"""Public names: matched without case, each for one thing. A catalog's come first, then a library's in their order."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.library.files import LibraryFile


class Names:
    """Names that are taken, and by whom."""

    def __init__(self, taken: Iterable[str]) -> None:
        """Begin with the catalog's."""
        self._owners = {name.strip().casefold(): "the catalog" for name in taken}

    def claim(self, file: LibraryFile) -> str | None:
        """Take the names of a file; why it cannot have them, if it cannot."""
        names = [file.name, *file.override.aliases]
        for name in names:
            if (owner := self._owners.get(name.strip().casefold())) is not None:
                return f"the name '{name}' is {owner}'s; say another `name` in a .yaml of its stem beside it"
        self._owners |= {name.strip().casefold(): file.path for name in names}
        return None
